"""The protocol between the training loop and an engine."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from pretrain.checkpoint import TensorSlice
from pretrain.data import Batch


@dataclass(frozen=True)
class LossSum:
    """A loss over the global batch.

    Attributes:
        total: sum of the unmasked tokens' losses, in nats.
        tokens: number of unmasked tokens.
    """

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per unmasked token."""
        return self.total / max(1, self.tokens)


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did.

    Attributes:
        grad_norm: 2-norm of the whole gradient before clipping.
        skipped: True when the gradient was not finite, so that nothing was updated.
    """

    grad_norm: float
    skipped: bool


class Engine(Protocol):
    """A model with its optimizer on this run's layout; every method is called by all ranks."""

    num_parameters: int

    def forward_backward(self, batches: list[Batch]) -> LossSum:
        """Loss of one global batch, given this replica's micro-batches; accumulates gradients."""

    def step(self, lr: float) -> StepResult:
        """Clip, update with learning rate ``lr``, and clear the gradients."""

    def evaluate(self, batches: Iterable[Batch]) -> LossSum:
        """Loss over batches without gradients, summed over the data-parallel replicas."""

    def sharded_state(self) -> list[TensorSlice]:
        """The rectangles of the checkpoint that this rank saves."""

    def load_sharded_state(self, load: Callable[[list[TensorSlice]], Any], step: int) -> None:
        """Fill the state by calling ``load(chunks)`` with every rectangle this rank needs.

        ``step`` is the number of optimizer updates done so far.
        """

    def close(self) -> None:
        """Free the memory of model and optimizer, for a process that goes on without them."""
