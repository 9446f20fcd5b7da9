"""What looks at single steps of a run: a protocol between the training loop and its watchers."""

from dataclasses import dataclass
from typing import Any, Self

from pretrain.data import Batch
from pretrain.watching.metrics import MetricLogger


@dataclass(frozen=True)
class WatchedStep:
    """A step that was watched.

    Attributes:
        step: finished steps.
        batches: this replica's micro-batches.
        data_wait: seconds that this rank waited for them.
    """

    step: int
    batches: list[Batch]
    data_wait: float


class StepWatcher:
    """Watches the steps that are due; this base does nothing.

    It is a context around a step, from its forward pass until the host knows the verdict. All ranks
    watch the same steps, so a watcher may send messages.

    Attributes:
        every: steps between those that are watched; 0 for none.
    """

    every = 0

    def due(self, step: int) -> bool:
        """Whether the step after which `step` steps are finished is watched."""
        return self.every > 0 and step % self.every == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        pass

    def before_update(self) -> None:
        """The gradient is complete, and nothing has changed yet."""

    def enqueued(self) -> None:
        """All work of the step is on its way to the device."""

    def tell(self, seen: WatchedStep, metrics: MetricLogger) -> None:
        """The step is done: log what was seen of it."""
