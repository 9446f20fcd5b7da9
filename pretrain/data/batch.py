"""What the loader hands to the trainer, and what the trainer stores to continue."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank; every tensor is [micro_batch, seq_len], or a
    context-parallel slice of that (`context_slice`).

    tokens int64; labels int64 (the next token); loss_mask float32 (0 where the target belongs to
    another document or is padding); boundaries bool (True at the first token of a document).
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    boundaries: torch.Tensor

    def context_slice(self, rank: int, size: int) -> Batch:
        """What context-parallel rank ``rank`` of ``size`` computes: its slice of every row.

        Boundaries stay those of the whole row: cells that see all positions need them.
        """
        if size == 1:
            return self
        width = self.tokens.shape[1] // size
        mine = slice(rank * width, (rank + 1) * width)
        parts = (self.tokens, self.labels, self.loss_mask)
        return Batch(*(part[:, mine].contiguous() for part in parts), self.boundaries)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        parts = (self.tokens, self.labels, self.loss_mask, self.boundaries)
        return Batch(*(part.to(device, non_blocking=True) for part in parts))


@dataclass(frozen=True)
class DataCursor:
    """Where a run stands in its data: all that a checkpoint needs, the same on every rank."""

    consumed_samples: int
    manifest_hash: str

    def to_dict(self) -> dict[str, int | str]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, int | str]) -> DataCursor:
        """Inverse of :meth:`to_dict`."""
        return cls(int(values["consumed_samples"]), str(values["manifest_hash"]))
