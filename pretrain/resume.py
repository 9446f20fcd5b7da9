"""Where a run stands, and how it continues from a checkpoint."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainState:
    """Where a run stands, the same on every rank and every layout.

    Attributes:
        step: finished steps.
        updates: finished steps whose update was applied (Adam's bias correction counts these).
        tokens: unmasked tokens trained on.
        seconds: wall-clock seconds spent in steps.
        valid_loss: the last validation loss, nats per token.
        valid_step: the step it was measured at.
    """

    step: int = 0
    updates: int = 0
    tokens: int = 0
    seconds: float = 0.0
    valid_loss: float | None = None
    valid_step: int | None = None
