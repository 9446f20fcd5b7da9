"""The loss of a model on one validation set, and by what the loss is sorted."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pretrain.config import RunConfig
from pretrain.data import Batch, TokenDataset
from pretrain.engines.base import LossSum
from pretrain.evaluation.answers import Answers, exact_documents, losses_and_hits
from xlstm_mcore import hardware

_BUCKETS = 40  # powers of two; no row is longer


@dataclass(frozen=True)
class SetLoss:
    """The loss on one validation set.

    Attributes:
        sum: over its unmasked tokens.
        targets_per_byte: of the set's text; None for a set with labels, which is not text.
        by: tokens from 2^n to 2^(n + 1) - 1, by n, of what they were asked to be sorted by.
        answers: of a set with labels, how they were answered.
        answers_by: the same, sorted as `by`; by position there are no samples.
    """

    sum: LossSum
    targets_per_byte: float | None
    by: Mapping[int, LossSum] = field(default_factory=dict)
    answers: Answers | None = None
    answers_by: Mapping[int, Answers] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Nats per unmasked token."""
        return self.sum.mean

    @property
    def perplexity(self) -> float:
        """`exp` of the loss; inf where fp64 ends, at 709 nats, and nan of a loss that is nan."""
        return math.inf if self.loss >= 709 else math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text, which does not depend on the tokenizer; None where none is read.

        The labels of a task are a choice of its positions, so bytes say nothing about its loss.
        """
        if self.targets_per_byte is None:
            return None
        return self.loss * self.targets_per_byte / math.log(2)


@torch.no_grad()
def measure(
    model: torch.nn.Module,
    dataset: TokenDataset,
    config: RunConfig,
    by: str | None = None,
    times: int = 1,
    frequency: Tensor | None = None,
) -> SetLoss:
    """The loss of a model on one set, and of a set with labels how they are answered.

    Args:
        model: in one process, or tensor parallel.
        dataset: the set.
        config: its `data.micro_batch` rows are read at once.
        by: see `main`; not "source" here.
        times: see `main`.
        frequency: by frequency, how often each id is a target of other data, such as those of
            training; see `frequencies`. None for the set's own.
    """
    rows = config.data.micro_batch
    if by == "frequency" and frequency is None:
        frequency = frequencies(dataset, rows)
    # Sum of the losses, tokens, right ones, samples and exact ones, by powers of two.
    sums = torch.zeros(5, _BUCKETS, dtype=torch.float64)
    for batch, there in _batches(dataset, rows, times):
        document = _documents(batch)
        sizes = _lengths(document, there) if by == "length" else _positions(document)
        if by == "frequency":
            assert frequency is not None
            sizes = frequency[batch.labels].clamp(min=1).double()
        bucket = sizes.log2().long() if by else torch.zeros_like(document)
        if dataset.manifest.labels:
            losses, hits = losses_and_hits(model, batch)
            asked, exact = exact_documents(document, hits, batch.loss_mask)
            # A document's number is below its first position, so all its positions are there.
            of_document = bucket.new_zeros(bucket.shape).scatter_(1, document, bucket)
            counted = [(hits * batch.loss_mask, bucket), (asked, of_document), (exact, of_document)]
        else:
            losses, counted = _losses(model, batch, times), []
        counted = [(losses * batch.loss_mask, bucket), (batch.loss_mask, bucket), *counted]
        for line, (weights, places) in zip(sums, counted, strict=False):
            each = weights.double().flatten()
            line += torch.bincount(places.flatten(), each, minlength=_BUCKETS).cpu()
    groups = {n: values for n, values in enumerate(sums.t().tolist()) if by and values[1]}
    total = sums.sum(1).tolist()
    return SetLoss(
        _loss(total),
        None if dataset.manifest.labels else dataset.targets_per_byte,
        {n: _loss(values) for n, values in groups.items()},
        _answers(total) if dataset.manifest.labels else None,
        {
            n: _answers(values if by == "length" else [*values[:3], 0, 0])
            for n, values in groups.items()
            if dataset.manifest.labels
        },
    )


def _losses(model: torch.nn.Module, batch: Batch, times: int) -> Tensor:
    """The loss of each position; long rows in windows of the trained length, the state carried."""
    if times == 1:
        return model(batch.tokens, batch.boundaries, batch.labels)
    cache: dict = {}
    windows = zip(
        *(part.chunk(times, 1) for part in (batch.tokens, batch.boundaries, batch.labels)),
        strict=True,
    )
    return torch.cat([model(*window, cache=cache) for window in windows], 1)


def _batches(
    dataset: TokenDataset, micro_batch: int, times: int = 1
) -> Iterator[tuple[Batch, Tensor]]:
    """All rows of a set, `times` joined to one, and which positions are not padding.

    The rows of a split continue each other in the order in which they were written, and a row that
    begins with a document has a boundary there.
    """
    device, width = hardware.device(), dataset.seq_len
    for first in range(0, dataset.num_rows, micro_batch * times):
        last = min(first + micro_batch * times, dataset.num_rows)
        rows = dataset.read(np.arange(first, last))
        if (last - first) % times:
            whole = -(-(last - first) // times) * times
            rows = rows.padded(whole, dataset.manifest.pad_id)
        there = torch.arange(width) < torch.from_numpy(rows.ends())[:, None]
        batch = Batch.of(rows)
        if times > 1:
            parts = (batch.tokens, batch.labels, batch.loss_mask, batch.boundaries)
            joined = [part.reshape(-1, times * width) for part in parts]
            batch = Batch(*joined, batch.sources[::times])
        yield batch.to(device), there.reshape(-1, times * width).to(device)


def frequencies(dataset: TokenDataset, micro_batch: int) -> Tensor:
    """How often each id is a target of a set, int64 `[ids]`; `micro_batch` rows at once."""
    size = dataset.manifest.vocab_size
    counts = torch.zeros(size, dtype=torch.int64, device=hardware.device())
    for batch, _ in _batches(dataset, micro_batch):
        counts += torch.bincount(batch.labels[batch.loss_mask > 0], minlength=size)
    return counts


def _documents(batch: Batch) -> Tensor:
    """The number in its row of the document of each position, int64 `[b, s]`.

    A row that begins in the middle of a document knows nothing of its beginning.
    """
    starts = batch.boundaries.clone()
    starts[:, 0] = True
    return starts.long().cumsum(1) - 1


def _positions(document: Tensor) -> Tensor:
    """The place of each position in its document, fp64 `[b, s]`, from 1."""
    place = torch.arange(document.shape[1], device=document.device).expand(document.shape)
    starts = torch.diff(document, dim=1, prepend=document.new_full((len(document), 1), -1)) > 0
    return (place - torch.where(starts, place, 0).cummax(1).values + 1).double()


def _lengths(document: Tensor, there: Tensor) -> Tensor:
    """The length of each position's document without the padding behind it, fp64 `[b, s]`."""
    lengths = torch.zeros_like(document).scatter_add_(1, document, there.long())
    return lengths.gather(1, document).clamp(min=1).double()


def _loss(values: list[float]) -> LossSum:
    return LossSum(values[0], int(values[1]))


def _answers(values: list[float]) -> Answers:
    return Answers(*map(int, values[1:]))
