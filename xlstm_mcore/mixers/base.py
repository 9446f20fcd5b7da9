"""What every mixer has: its place among the ranks, and parameters split over them by heads."""

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.mixers.observation import Observer
from xlstm_mcore.modules.linear import (
    ColumnLinear,
    RowLinear,
    input_projection,
    output_projection,
)
from xlstm_mcore.parallel.context import ContextParallel
from xlstm_mcore.parallel.tensor import TensorParallelRegion
from xlstm_mcore.parameters.slices import new_parameter, stacked_slices
from xlstm_mcore.recompute import known_output


def by_sequence(x: Tensor, batch: int) -> Tensor:
    """Tokens `[s * b, c]` as `[s, b, c]`."""
    return x.view(-1, batch, x.shape[-1])


class Mixer(nn.Module):
    """Base of the sequence mixers. It makes their parameters; `forward` is theirs.

    Every mixer has `forward(x, batch, boundaries, cache=None)`, which mixes `x [s(/cp/tp) * b, h]`
    along the sequence and keeps its shape. Tokens are in the order of the sequence, then of the
    batch, and `batch` is `b`. `boundaries` is bool `[b, s]` of the whole row, True at the first
    token of a document, or None. `cache` is the layer's state between calls when generating, a
    dictionary that the mixer reads and updates, or None.

    Args:
        config: The model's configuration.
        pg_collection: Process groups (`tp` and `cp` are read).
        prefix: Prefix of the parameters' global names, `decoder.layers.N.mixer.`.

    Attributes:
        observe: Called with what the cell did in each forward pass; None observes nothing. A mixer
            without a cell ignores it.
    """

    observe: Observer | None = None

    def __init__(
        self, config: XLSTMConfig, pg_collection: ProcessGroupCollection, prefix: str
    ) -> None:
        super().__init__()
        self.config, self.prefix = config, prefix
        self.region = TensorParallelRegion(config, pg_collection.tp)
        self.context = ContextParallel(pg_collection.cp)

    def gathered(self, x: Tensor) -> Tensor:
        """All channels at every position of the slice: `[s(/tp) * b, h] -> [s * b, h]`.

        Where the whole is needed again, selective recompute repeats the collective in the backward
        pass, and no rank holds all of the sequence.
        """
        return known_output(self.region.gather(x), self.region.gather, x)

    def split_parameter(self, shapes: dict[str, tuple[int, ...]], dim: int = 0) -> nn.Parameter:
        """This rank's part of some tensors, one below the other.

        Args:
            shapes: Their global shapes, by their names without the prefix.
            dim: The dimension that is split over the ranks; the tensor-parallel size divides it.
        """
        shapes = {f"{self.prefix}{name}": shape for name, shape in shapes.items()}
        rank, size = self.region.rank, self.region.size
        return new_parameter(
            self.config, stacked_slices(shapes, shard_dim=dim, rank=rank, size=size)
        )

    def input_projection(
        self, widths: dict[str, int], kind: type[ColumnLinear] = ColumnLinear
    ) -> Any:
        """One product for several projections of the gathered input, `name: width` each.

        See `modules.linear.input_projection`; names come without the prefix.
        """
        widths = {f"{self.prefix}{name}": width for name, width in widths.items()}
        return input_projection(self.config, self.region, widths, kind)

    def output_projection(self, width: int) -> RowLinear:
        """The projection `out_proj` from `width` channels back to the residual stream."""
        name = f"{self.prefix}out_proj.weight"
        return output_projection(self.config, self.region, name, width)
