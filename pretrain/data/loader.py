"""Batches of one data-parallel rank, prefetched by a thread.

Rank r of dp_size takes, of the global batch that starts at sample b0 and for accumulation index a,
the samples [b0 + (a * dp_size + r) * micro_batch, + micro_batch): the union over ranks and
accumulation steps is the same set of samples for every dp_size. Ranks of the other parallel
dimensions pass the same dp_rank and read the same rows (cheap: page cache), nothing is broadcast.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import torch

from pretrain.data.batch import Batch, DataCursor
from pretrain.data.dataset import TokenDataset
from pretrain.data.order import locate

_PREFETCH_STEPS = 2
_POLL_SECONDS = 0.1  # how long a thread may outlive the loader that it works for


def _to_batch(tokens: np.ndarray, loss_mask: np.ndarray, boundaries: np.ndarray) -> Batch:
    rows = torch.from_numpy(tokens)
    return Batch(
        tokens=rows[:, :-1].contiguous(),
        labels=rows[:, 1:].contiguous(),
        loss_mask=torch.from_numpy(loss_mask),
        boundaries=torch.from_numpy(boundaries),
    )


def _check_rank(dp_rank: int, dp_size: int) -> None:
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank={dp_rank} is not in [0, dp_size={dp_size})")


class _Plan:
    """The pure part of a TrainLoader: what the step at a sample number consists of."""

    def __init__(self, dataset, seed, global_batch, micro_batch, dp_rank, dp_size):
        self.dataset, self.seed = dataset, seed
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.dp_rank, self.dp_size = dp_rank, dp_size

    def step(self, first_sample: int) -> list[Batch]:
        """Micro-batches of the step whose global batch starts at ``first_sample``."""
        stride = self.micro_batch * self.dp_size
        starts = first_sample + self.dp_rank * self.micro_batch
        samples = np.arange(starts, starts + self.global_batch, stride)[:, None]
        samples = samples + np.arange(self.micro_batch)
        _, rows = locate(samples, self.dataset.num_rows, seed=self.seed)
        return [_to_batch(*self.dataset.read(micro)) for micro in rows]


def _produce(plan: _Plan, first_sample: int, out: queue.Queue, stop: threading.Event) -> None:
    """Fill ``out`` with ("step", micro-batches) until ``stop``; an exception travels as "error"."""
    while not stop.is_set():
        try:
            item = ("step", plan.step(first_sample))
        except BaseException as error:  # handed to the consumer, whatever it is
            item = ("error", error)
        while not stop.is_set():
            try:
                out.put(item, timeout=_POLL_SECONDS)
                break
            except queue.Full:
                continue
        if item[0] == "error":
            return
        first_sample += plan.global_batch


class TrainLoader:
    """Endless iterator over steps; each is the list of this rank's micro-batches.

    Args:
        dataset: the training split.
        seed: with the sample number it decides every row.
        global_batch: samples per step over all ranks and accumulation steps.
        micro_batch: samples per forward pass of one rank.
        dp_rank, dp_size: this rank's place among the data-parallel ranks.
        consumed_samples: where to start; 0 or what a checkpoint's cursor says.

    Raises:
        ValueError: global_batch is not a multiple of micro_batch * dp_size (and bad ranges).
        CorruptShardError: from ``next``, when bytes on disk are not those that were written.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        consumed_samples: int = 0,
    ):
        _check_rank(dp_rank, dp_size)
        if min(global_batch, micro_batch) < 1 or global_batch % (micro_batch * dp_size):
            per_step = max(micro_batch, 1) * dp_size
            near = max(1, round(global_batch / per_step)) * per_step
            raise ValueError(
                f"data.global_batch={global_batch} is not a positive multiple of "
                f"data.micro_batch={micro_batch} x data-parallel size {dp_size}; "
                f"use data.global_batch={near} or another data.micro_batch"
            )
        if consumed_samples < 0:
            raise ValueError(f"consumed_samples={consumed_samples} must not be negative")
        self.dataset = dataset
        self.consumed_samples = consumed_samples
        self._plan = _Plan(dataset, seed, global_batch, micro_batch, dp_rank, dp_size)
        self._stop = threading.Event()
        self._queue: queue.Queue = queue.Queue(maxsize=_PREFETCH_STEPS)
        # The thread knows plan, queue and event but not the loader, so that an abandoned loader is
        # collected and its finaliser ends the thread.
        self._thread = threading.Thread(
            target=_produce,
            args=(self._plan, consumed_samples, self._queue, self._stop),
            name="train-loader",
            daemon=True,
        )
        self._finalizer = weakref.finalize(self, self._stop.set)
        self._error: BaseException | None = None

    @property
    def cursor(self) -> DataCursor:
        """Position after the last step that was handed out (prefetched ones do not count)."""
        return DataCursor(self.consumed_samples, self.dataset.manifest.hash)

    @property
    def epoch(self) -> float:
        """Passes over the training rows so far."""
        return self.consumed_samples / self.dataset.num_rows

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._error is not None:
            raise self._error
        if self._stop.is_set():
            raise StopIteration
        if self._thread.ident is None:
            self._thread.start()
        kind, value = self._queue.get()
        if kind == "error":
            self._error = value
            raise value
        self.consumed_samples += self._plan.global_batch
        return value

    def close(self) -> None:
        """End the thread and wait for it; the loader yields nothing more."""
        self._finalizer()
        if self._thread.ident is not None:
            self._thread.join()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


class ValidLoader:
    """Walks a split once, in order; iterate again to walk again.

    Batch j of rank r holds the rows [(j * dp_size + r) * micro_batch, + micro_batch). Rows past the
    end are pad tokens with loss_mask 0, so that every rank has ``len(self)`` batches of full size.

    Raises:
        ValueError: dp_rank outside dp_size or micro_batch < 1.
    """

    def __init__(
        self, dataset: TokenDataset, *, micro_batch: int, dp_rank: int = 0, dp_size: int = 1
    ):
        _check_rank(dp_rank, dp_size)
        if micro_batch < 1:
            raise ValueError(f"data.micro_batch={micro_batch} must be at least 1")
        self.dataset, self.micro_batch = dataset, micro_batch
        self.dp_rank, self.dp_size = dp_rank, dp_size

    def __len__(self) -> int:
        return -(-self.dataset.num_rows // (self.micro_batch * self.dp_size))

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            first = (number * self.dp_size + self.dp_rank) * self.micro_batch
            rows = np.arange(first, min(first + self.micro_batch, self.dataset.num_rows))
            parts = self.dataset.read(rows)
            missing = self.micro_batch - len(rows)
            if missing:
                pad_id = self.dataset.manifest.pad_id
                fill = (pad_id, 0.0, False)
                parts = tuple(
                    np.pad(part, ((0, missing), (0, 0)), constant_values=value)
                    for part, value in zip(parts, fill, strict=True)
                )
            yield _to_batch(*parts)
