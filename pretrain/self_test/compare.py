"""How far a layout's tensors lie from those of one process, and how far rounding may take them.

Every rank compares the slices that it would save, so no rank holds more than its own share. What
rounding does is measured and not guessed: one process computes everything twice, the second time
from weights that are changed by a few units of the last place. A model that turns these into large
differences is granted large differences.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from pretrain.checkpoint import TensorSlice
from pretrain.layout import Layout
from xlstm_io.checkpoint.manifest import OPTIMIZER_PREFIX
from xlstm_io.checkpoint.reader import CheckpointReader
from xlstm_io.storage import Location

FACTOR = 10.0  # a layout adds numbers up in another order at many places, a nudge changes one
FLOOR = 1e-5  # of the 2-norm; sums over more terms than a nudge shows
# Inside a block, from its input to its output.
ORDER = ("mixer_norm", "mixer", "mixer.head_norm", "mixer.out_proj", "ffn_norm", "ffn")


@dataclass
class Difference:
    """One tensor, over all ranks.

    Attributes:
        elements: how many were compared.
        error: squared 2-norm of the difference from one process.
        noise: the same of what rounding does to one process.
        size: squared 2-norm of the tensor in one process.
        exact: whether rounding explains nothing.
        ranks: which ranks hold slices that differ by more than the limit.
    """

    elements: int = 0
    error: float = 0.0
    noise: float = 0.0
    size: float = 0.0
    exact: bool = False
    ranks: set[int] = field(default_factory=set)

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(
            self.elements + other.elements,
            self.error + other.error,
            self.noise + other.noise,
            self.size + other.size,
            self.exact or other.exact,
            self.ranks | other.ranks,
        )

    @property
    def relative(self) -> float:
        """The difference over the tensor's own size."""
        return _ratio(self.error, self.size)

    @property
    def limit(self) -> float:
        """The largest one that rounding explains."""
        return 0.0 if self.exact else max(FLOOR, FACTOR * _ratio(self.noise, self.size))


def _ratio(error: float, size: float) -> float:
    if error == 0:
        return 0.0
    return math.sqrt(error / size) if size > 0 else math.inf


@torch.no_grad()
def differences(
    slices: Iterable[TensorSlice],
    reference: Location,
    nudged: Location,
    layout: Layout,
    scale: float = 1.0,
    *,
    exact: bool = False,
) -> dict[str, Difference]:
    """Compare what the ranks would save with two checkpoints of one process; on all ranks.

    Args:
        slices: this rank's.
        reference: the checkpoint of one process.
        nudged: that of its second run.
        layout: where this process stands.
        scale: what this rank's values are multiplied by first.
        exact: rounding explains nothing.

    Returns:
        By global name; the same on every rank.
    """
    mine: dict[str, Difference] = {}
    with CheckpointReader(reference) as first, CheckpointReader(nudged) as second:
        for part in slices:
            values = [part.tensor.detach().cpu().double()]
            for reader in (first, second):
                there = torch.empty(part.tensor.shape, dtype=part.tensor.dtype)
                reader.read_into(
                    TensorSlice(part.name, part.global_shape, part.global_offset, there)
                )
                values.append(there.double())
            ours, true, other = values
            noise = 0.0 if exact else _squares(other - true)
            found = Difference(
                true.numel(), _squares(scale * ours - true), noise, _squares(true), exact
            )
            if not found.relative <= found.limit:  # true for nan too
                found.ranks = {layout.rank}
            mine[part.name] = mine.get(part.name, Difference()) + found
    total: dict[str, Difference] = {}
    for answer in layout.gather(mine):
        for name, found in answer.items():
            total[name] = total.get(name, Difference()) + found
    return total


def _squares(values: torch.Tensor) -> float:
    return values.square().sum().item()


def uncounted(found: dict[str, Difference], slices: dict[str, Sequence[int]]) -> Iterator[str]:
    """A line for each tensor that the ranks together do not hold exactly once.

    Args:
        found: what was compared.
        slices: the global shapes by name.
    """
    counts = Counter({name: one.elements for name, one in found.items()})
    for name, shape in slices.items():
        if counts[name] != math.prod(shape):
            yield f"{name}: the ranks save {counts[name]:,} of its {math.prod(shape):,} elements"


def parameter_of(name: str) -> str:
    """The parameter that a weight, master weight or moment belongs to."""
    if not name.startswith(OPTIMIZER_PREFIX):
        return name
    return name.removeprefix(f"{OPTIMIZER_PREFIX}state.").partition(".")[2]


def position(name: str) -> tuple[int, int, int, str]:
    """Where a parameter works in the forward pass; sorts names from the input to the loss."""
    words = name.split(".")
    if not name.startswith("decoder.layers."):
        last = name.startswith(("decoder.final_norm", "output_layer"))
        return (2 if last else 0, 0, int(words[0] == "output_layer"), name)
    inside = ".".join(words[3:])
    matching = [n for n, start in enumerate(ORDER) if inside.startswith(f"{start}.")]
    return (1, int(words[2]), max(matching, default=0), name)
