"""What the loader gives the trainer, and what the trainer stores to continue."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from pretrain.data.dataset import Rows
from pretrain.data.quarantine import DamagedRow


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank.

    Tensors are `[micro_batch, seq_len]` unless said otherwise; `context_slice` cuts those whose
    positions are computed apart.

    Attributes:
        tokens: Int64.
        labels: Int64, the next token, or what the shards have as labels.
        loss_mask: Float32; 1 where the loss counts. It is 0 where the next token belongs to another
            document or is padding, and where the shards have no label.
        boundaries: Bool; True at the first token of a document.
        sources: Float64 `[micro_batch, sources]`, 1 at the source of each row and 0 elsewhere. It
            has no columns where losses are not told apart by source.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    boundaries: torch.Tensor
    sources: torch.Tensor

    def context_slice(self, rank: int, size: int) -> Batch:
        """The slice of every row that context-parallel rank `rank` of `size` computes.

        Boundaries stay those of the whole row, because cells that see all positions need them.
        """
        if size == 1:
            return self
        width = self.tokens.shape[1] // size
        mine = slice(rank * width, (rank + 1) * width)
        return Batch(
            self.tokens[:, mine].contiguous(),
            self.labels[:, mine].contiguous(),
            self.loss_mask[:, mine].contiguous(),
            self.boundaries,
            self.sources,
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; the host does not wait for the work that is queued there."""
        parts = list(vars(self).values())
        if torch.device(device).type != "cpu" and torch.accelerator.is_available():
            # A copy from ordinary memory may wait. torch keeps pinned memory for the next batch.
            parts = [part.pin_memory() if part.device.type == "cpu" else part for part in parts]
        return Batch(*(part.to(device, non_blocking=True) for part in parts))

    def without_loss(self) -> Batch:
        """The same batch with every token masked."""
        return replace(self, loss_mask=torch.zeros_like(self.loss_mask))

    @classmethod
    def of(cls, rows: Rows, sources: np.ndarray | None = None) -> Batch:
        """All rows as one batch.

        Args:
            rows: The rows.
            sources: See `sources` of the class; None for no columns.
        """
        tokens = rows.tokens[:, :-1].astype(np.int64)
        if sources is None:
            sources = np.zeros((len(tokens), 0))
        return cls(*map(torch.from_numpy, (tokens, rows.targets(), *rows.masks(), sources)))

    def split(self, micro_batch: int) -> list[Batch]:
        """The micro-batches of `micro_batch` rows; they are views of this batch's tensors."""
        cut = (part.split(micro_batch) for part in vars(self).values())
        return [Batch(*fields) for fields in zip(*cut, strict=True)]


@dataclass(frozen=True)
class DataCursor:
    """How much data a run has consumed: all that a checkpoint needs, the same on every rank.

    Attributes:
        consumed_samples: Number of samples consumed.
        plan: Description of their order (`DataPlan.describe`). A checkpoint continues only with
            data of the same description, or where the user accepts the change.
        quarantined: The damaged rows that the run met.
        skipped: Samples that the run left out, as pairs of the first one and their number. They
            count as consumed.
    """

    consumed_samples: int
    plan: dict[str, Any] = field(default_factory=dict)
    quarantined: tuple[DamagedRow, ...] = ()
    skipped: tuple[tuple[int, int], ...] = ()

    def skip(self, samples: int) -> DataCursor:
        """The cursor after the next `samples` samples, which are left out."""
        interval = (self.consumed_samples, samples)
        return replace(
            self,
            consumed_samples=self.consumed_samples + samples,
            skipped=(*self.skipped, interval),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {**asdict(self), "quarantined": [asdict(row) for row in self.quarantined]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataCursor:
        """Inverse of `to_dict`."""
        rows = tuple(DamagedRow(**row) for row in values.get("quarantined", ()))
        skipped = tuple((int(first), int(n)) for first, n in values.get("skipped", ()))
        return cls(int(values["consumed_samples"]), dict(values.get("plan", {})), rows, skipped)
