"""The protocols between the training loop, an engine and an engine's optimizer."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from pretrain.checkpoint import TensorSlice
from pretrain.data import Batch
from pretrain.engines.verdict import Verdict


@dataclass(frozen=True)
class LossSum:
    """A loss over many tokens.

    Attributes:
        total: sum of the unmasked tokens' losses, in nats.
        tokens: number of unmasked tokens.
    """

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per unmasked token; nan where there is none, which is not a loss of 0."""
        return self.total / self.tokens if self.tokens else math.nan


@dataclass(frozen=True)
class Held:
    """A tensor that other ranks may hold too.

    Attributes:
        name: its global name.
        tensor: this rank's copy.
        over_data: whether every data-parallel replica holds the same.
        over_tensor: whether every tensor-parallel rank holds the same.
    """

    name: str
    tensor: Tensor
    over_data: bool
    over_tensor: bool


def mean_of(sums: Iterable[LossSum]) -> float:
    """Nats per unmasked token over several sets; each counts as much as it has tokens."""
    sums = list(sums)
    return LossSum(sum(s.total for s in sums), sum(s.tokens for s in sums)).mean


class Engine(Protocol):
    """A model with its optimizer on this run's layout; every method is called by all ranks.

    Attributes:
        models: this rank's model chunks.
        num_parameters: parameters of the whole model.
        own_losses: this rank's losses of the last micro-batches that ran, before they were summed
            over ranks, as `forward_backward` returns them. Only ranks of the last pipeline stage
            have any.
    """

    models: Sequence[nn.Module]
    num_parameters: int
    own_losses: list[Tensor]

    def forward_backward(self, batches: list[Batch]) -> Tensor:
        """Accumulate the gradients of one global batch, given this replica's micro-batches.

        Returns:
            fp64 `[2 + 2 * sources]` on the device: the sum of the unmasked tokens' losses over the
            global batch and the number of these tokens, then the sums of each source of
            `Batch.sources`, and then their numbers.
        """

    def gradient_norm(self) -> Tensor:
        """Complete the gradients; the 2-norm of the whole gradient, a scalar on the device."""

    def gradients(self) -> Iterator[TensorSlice]:
        """The slices of the whole gradient that this rank counts, between its norm and the step.

        Every element is counted by exactly one rank; the names are those of the weights. DeepSpeed
        gathers gradients while the ranks go through them, so all ranks must go through all.
        """

    def masters(self) -> Iterator[TensorSlice]:
        """The slices of the fp32 master weights that this rank counts, as for gradients."""

    def step(self, lr: float, verdict: Verdict) -> None:
        """Clip and update with learning rate `lr` if the verdict allows it; clear the gradients."""

    def evaluate(self, batches: Iterable[Batch]) -> LossSum:
        """Loss over batches without gradients, summed over the data-parallel replicas."""

    def next_tokens(self, texts: Sequence[Sequence[int]]) -> list[int]:
        """The likeliest token after each of some short texts, given as ids; the same everywhere."""

    def sharded_state(self) -> list[TensorSlice]:
        """The slices of the checkpoint that this rank saves."""

    def load_sharded_state(self, load: Callable[[list[TensorSlice]], Any], updates: int) -> None:
        """Fill the state by calling `load` with every slice that this rank needs.

        Args:
            load: copies a checkpoint's values into the slices it is given.
            updates: optimizer updates done so far, for Adam's bias correction.
        """

    def held(self) -> Iterator[Held]:
        """What this rank holds that other ranks may hold too, in the same order on all of them."""

    def held_gradients(self) -> Iterator[Held]:
        """The same of the whole gradient, between its norm and the step; see `gradients`."""

    def close(self) -> None:
        """Free the memory of model and optimizer, for a process that goes on without them."""


class Optimizer(Protocol):
    """What `MegatronEngine` asks of its optimizer.

    Attributes:
        shares_gradients: whether it takes its partition of the gradients alone, as Megatron's
            DistributedOptimizer does. Its state is shared out over data-parallel ranks either way.
    """

    shares_gradients: bool

    def gradient_norm(self) -> Tensor:
        """Take the gradients from the model; their 2-norm over all ranks, a scalar."""

    def step(self, lr: float, verdict: Verdict) -> None:
        """Clip and update with learning rate `lr` if the verdict allows it."""

    def clear_gradients(self) -> None:
        """Forget the gradients that `gradient_norm` took."""

    def gradients(self) -> Iterator[tuple[Tensor, TensorSlice]]:
        """Each parameter of the model with the slices of its gradient that `gradient_norm` took."""

    def slices(self) -> Iterator[tuple[Tensor, TensorSlice]]:
        """Each parameter of the model with the slices of its fp32 master weight and state."""

    def set_updates(self, updates: int) -> None:
        """Tell that the state was loaded, and how many updates were done before."""
