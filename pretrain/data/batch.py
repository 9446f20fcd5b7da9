"""What the loader hands to the trainer, and what the trainer stores to continue."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from pretrain.data.dataset import Rows
from pretrain.data.quarantine import DamagedRow


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
        """What context-parallel rank `rank` of `size` computes: its slice of every row.

        Boundaries stay those of the whole row: cells that see all positions need them.
        """
        if size == 1:
            return self
        width = self.tokens.shape[1] // size
        mine = slice(rank * width, (rank + 1) * width)
        parts = (self.tokens, self.labels, self.loss_mask)
        return Batch(*(part[:, mine].contiguous() for part in parts), self.boundaries)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        parts = (self.tokens, self.labels, self.loss_mask, self.boundaries)
        return Batch(*(part.to(device, non_blocking=True) for part in parts))

    @classmethod
    def of(cls, rows: Rows) -> Batch:
        """All rows as one batch."""
        tokens, labels = rows.tokens[:, :-1], rows.tokens[:, 1:]
        parts = (tokens.astype(np.int64), labels.astype(np.int64), *rows.masks())
        return cls(*map(torch.from_numpy, parts))

    def split(self, micro_batch: int) -> list[Batch]:
        """Cut into micro-batches; they are views of this one's tensors."""
        cut = (part.split(micro_batch) for part in vars(self).values())
        return [Batch(*fields) for fields in zip(*cut, strict=True)]


@dataclass(frozen=True)
class DataCursor:
    """Where a run stands in its data: all that a checkpoint needs, the same on every rank.

    plan is the description of the order of the consumed samples (`DataPlan.describe`): a
    checkpoint continues only on data that describe themselves equally, or where a change is meant.
    quarantined are the damaged rows that were met.
    """

    consumed_samples: int
    plan: dict[str, Any] = field(default_factory=dict)
    quarantined: tuple[DamagedRow, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {**asdict(self), "quarantined": [asdict(row) for row in self.quarantined]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataCursor:
        """Inverse of `to_dict`."""
        rows = tuple(DamagedRow(**row) for row in values.get("quarantined", ()))
        return cls(int(values["consumed_samples"]), dict(values.get("plan", {})), rows)
