"""The classic sLSTM mixer (xLSTM, arXiv 2405.04517, figure 10), parallel by heads.

Convolution, gates and recurrence are block-diagonal over heads, so a rank needs its own channels
only: with sequence parallelism one all-to-all brings them in and one takes the result back. The
recurrence needs all positions in turn, so context parallelism too cuts heads here, not positions:
a second all-to-all, after which every rank runs the whole sequence of its `1/(tp cp)` of them.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.mixers.kernel_calls import run_conv, run_head_norm, run_slstm
from xlstm_mcore.modules.linear import parameter
from xlstm_mcore.parallel.context import ContextParallel
from xlstm_mcore.parallel.tensor import TensorParallelRegion
from xlstm_mcore.parameters.slices import ParameterSlice, packed
from xlstm_mcore.recompute import recompute_in_backward

GATES = ("igate", "fgate", "zgate", "ogate")


class SLSTMMixer(nn.Module):
    """sLSTM with convolution, headwise gates and per-head norm; no output projection.

    Args:
        config: the model's configuration.
        pg_collection: process groups (`tp` and `cp` are read).
        prefix: canonical prefix of the parameters' names, `decoder.layers.N.mixer.`.
    """

    def __init__(
        self, config: XLSTMConfig, pg_collection: ProcessGroupCollection, prefix: str
    ) -> None:
        super().__init__()
        self.config = config
        self.region = region = TensorParallelRegion(config, pg_collection.tp)
        self.context = ContextParallel(pg_collection.cp)
        heads, width = config.num_heads, config.hidden_size
        self.num_heads, self.head_dim = heads // region.size, width // heads
        mine, d = self.num_heads, self.head_dim
        shard = {"shard_dim": 0, "rank": region.rank, "size": region.size}

        self.conv_weight = self.conv_bias = None
        if config.conv_width:
            self.conv_weight = parameter(
                config,
                (mine * d, config.conv_width),
                packed([f"{prefix}conv.weight"], [(width, config.conv_width)], **shard),
            )
            self.conv_bias = parameter(
                config, (mine * d,), packed([f"{prefix}conv.bias"], [(width,)], **shard)
            )
        self.gate_weight = parameter(
            config,
            (4 * mine, d, d),
            packed([f"{prefix}{g}.weight" for g in GATES], [(heads, d, d)] * 4, **shard),
        )
        first = region.rank * mine
        self.recurrent_weight = parameter(
            config,
            (4, mine, d, d),
            [
                ParameterSlice(
                    f"{prefix}recurrent_weight",
                    (4, heads, d, d),
                    (0, first, 0, 0),
                    (0, 0, 0, 0),
                    (4, mine, d, d),
                )
            ],
        )
        self.bias = parameter(
            config,
            (4, mine, d),
            [
                ParameterSlice(
                    f"{prefix}bias", (4, heads, d), (0, first, 0), (0, 0, 0), (4, mine, d)
                )
            ],
        )
        self.head_norm_weight = parameter(
            config, (mine * d,), packed([f"{prefix}head_norm.weight"], [(width,)], **shard)
        )

    def forward(self, x: Tensor, boundaries: Tensor | None, cache: dict | None = None) -> Tensor:
        """Mix along the sequence: `x [s(/cp/tp), b, h]` to the same shape.

        Args:
            x: this rank's positions.
            boundaries: bool `[b, s]` of the whole row, True at the first token of a document, or
                None.
            cache: state of this layer between calls when generating; read and updated.
        """
        own = self.context.own  # a parameter's part for the heads this rank computes
        x = self.context.to_heads(self.region.to_heads(x)).transpose(0, 1)  # [b, s, heads * d]
        weight, bias = own(self.conv_weight, 0), own(self.conv_bias, 0)
        x_c = run_conv(self.config, x, weight, bias, boundaries, cache)
        h = run_slstm(
            self.config,
            self._gate_preacts(x, x_c),
            own(self.recurrent_weight, 1),
            own(self.bias, 1),
            boundaries,
            cache,
        )
        h = recompute_in_backward(self._head_norm, h, own(self.head_norm_weight, 0)).transpose(0, 1)
        return self.region.from_heads(self.context.from_heads(h))

    def _head_norm(self, h: Tensor, weight: Tensor) -> Tensor:
        return run_head_norm(self.config, h, weight).flatten(2)

    def _gate_preacts(self, x: Tensor, x_c: Tensor) -> Tensor:
        """`[b, s, 4, heads, d]`: i and f from the convolved input, z and o from the input."""
        b, s, _ = x.shape
        d = self.head_dim
        weight = self.context.own(self.gate_weight.view(2, 2, self.num_heads, d, d), 2)
        heads = weight.shape[2]
        parts = []
        for source, pair in zip((x_c, x), weight, strict=True):
            rows = source.reshape(b * s, heads, d).transpose(0, 1)
            columns = pair.permute(1, 3, 0, 2).flatten(2)  # [heads, in, 2 * out]
            product = torch.bmm(rows, columns).view(heads, b, s, 2, d)
            parts.append(product.permute(1, 2, 3, 0, 4))
        return torch.cat(parts, dim=2)
