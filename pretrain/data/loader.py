"""Batches of one data-parallel rank, prefetched by a thread or by worker processes.

Of the global batch that starts at sample b0, rank r of dp_size takes, for accumulation index a, the
samples [b0 + (a * dp_size + r) * micro_batch, + micro_batch). So the union over ranks and
accumulation steps is the same set of samples for every dp_size. Ranks of the other parallel
dimensions pass the same dp_rank and read the same rows, which is cheap because of the page cache.
Nothing is broadcast.

The steps of a rank go through one webdataset pipeline, which its worker processes divide among
them: worker w makes the steps w, w + workers, and so on. torch's DataLoader takes the steps from
the workers in turn, so their order does not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import webdataset as wds

from pretrain.config.ramp import BatchRamp
from pretrain.data.batch import Batch, DataCursor
from pretrain.data.dataset import Rows, TokenDataset
from pretrain.data.plan import DataPlan
from pretrain.data.quarantine import DamagedRow, Quarantine
from pretrain.data.reading_ahead import ReadingProcesses, ReadingThread
from xlstm_io.shards.index import CorruptShardError

_LOOK_AHEAD = 1024  # samples that are located at once, to spread numpy's cost per call over them


class StepRows(NamedTuple):
    """What a step of one rank consists of.

    Attributes:
        rows: Its rows, one micro-batch after the other.
        sources: Place in the plan's `source_names` of each row's source.
        damaged: Those that are damaged, and padding without a loss here.
    """

    rows: Rows
    sources: np.ndarray
    damaged: list[DamagedRow]


# What goes from a pipeline to the loader: a step, or what went wrong.
Item = StepRows | Exception


def _check_rank(dp_rank: int, dp_size: int) -> None:
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank={dp_rank} is not in [0, dp_size={dp_size})")


class _Steps:
    """Which samples each step of a rank consists of, and how they are read."""

    def __init__(
        self,
        plan: DataPlan,
        ramp: BatchRamp,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        first_step: int,
        consumed_samples: int,
        micro_batches: Callable[[int], int],
    ) -> None:
        self.micro_batches = micro_batches
        self.plan, self.ramp, self.micro_batch = plan, ramp, micro_batch
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.first_step = first_step
        self._offset = consumed_samples - ramp.samples(first_step)

    def numbers(self) -> Iterator[int]:
        """The steps to come, without end."""
        return count(self.first_step)

    def samples(self, step: int) -> np.ndarray:
        """Sample numbers of this rank in a step, one micro-batch after the other.

        Those past the end of the global batch, which a filled batch has places for, are left out:
        they would be the last of every rank.
        """
        first = self.ramp.samples(step) + self._offset
        end = first + self.ramp.size(step)
        starts = np.arange(
            first + self.dp_rank * self.micro_batch, end, self.micro_batch * self.dp_size
        )
        samples = (starts[:, None] + np.arange(self.micro_batch)).ravel()
        return samples[samples < end]

    def make(self, numbers: Iterator[int]) -> Iterator[Item]:
        """Read each step; this is the stage of the pipeline.

        Rows go through a pipe in the types that they have on disk, two or four bytes a token, and
        become tensors where they are used. Tensors would go through shared memory, with ten times
        the bytes. An error is yielded, and ends the pipeline, because torch does not send an
        exception from a worker process as it is.
        """
        try:
            for step, samples, which, rows in self._located(numbers):
                found = self.plan.read(which, rows)
                sources = self.plan.sources_of(which, rows)
                places = self.micro_batches(self.ramp.size(step)) * self.micro_batch
                if places > len(rows):
                    found = found.padded(places, self.plan.manifest.pad_id)
                    # Without a loss it does not matter whose they are.
                    sources = np.pad(sources, (0, places - len(rows)))
                damaged = [
                    DamagedRow.of(int(samples[n]), self.plan.names[which[n]], int(rows[n]), error)
                    for n, error in found.damaged
                ]
                yield StepRows(found, sources, damaged)
        except Exception as error:  # handed to the consumer, whatever it is
            yield error

    def _located(self, numbers: Iterator[int]) -> Iterator[tuple[Any, ...]]:
        """Each step with its samples, and their sources and rows."""
        for step in numbers:
            window = [self.samples(step)]
            more = _LOOK_AHEAD // max(1, len(window[0])) - 1
            steps = [step, *islice(numbers, max(0, more))]
            window += [self.samples(number) for number in steps[1:]]
            ends = np.cumsum([len(part) for part in window])[:-1]
            samples = np.concatenate(window)
            found = (samples, *self.plan.locate(samples))
            yield from zip(steps, *(np.split(part, ends) for part in found), strict=True)


class TrainLoader:
    """Endless iterator over steps; each is the list of this rank's micro-batches.

    Args:
        plan: Which row each sample is.
        ramp: Samples per step over all ranks and accumulation steps.
        micro_batch: Samples per forward pass of one rank.
        dp_rank: This rank among the data-parallel ranks.
        dp_size: Number of data-parallel ranks.
        step: Number of finished steps; the loader starts with the next one.
        consumed_samples: What a checkpoint's cursor says; None takes the ramp's number at `step`.
        workers: Processes that read ahead; 0 reads ahead in a thread of this process.
        quarantine: Where damaged rows go, if the plan's datasets return them as padding.
        skipped: Samples that were left out before; the cursor carries them on.
        micro_batches: How many of them a rank has for a global batch of so many rows. Where they
            have more places than there are rows, the last ones are padding without a loss. None:
            there must be as many places as rows.

    Raises:
        ValueError: A batch of the ramp is not a multiple of micro_batch * dp_size, or a number is
            out of range.
        CorruptShardError: From `next`: bytes on disk are not those that were written.
        DataError: From `next`: the quarantine is full.
    """

    def __init__(
        self,
        plan: DataPlan,
        ramp: BatchRamp,
        *,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        step: int = 0,
        consumed_samples: int | None = None,
        workers: int = 0,
        quarantine: Quarantine | None = None,
        skipped: tuple[tuple[int, int], ...] = (),
        micro_batches: Callable[[int], int] | None = None,
    ) -> None:
        _check_rank(dp_rank, dp_size)
        per_step = max(micro_batch, 1) * dp_size
        for size in ramp.sizes:
            if min(size, micro_batch) < 1 or (micro_batches is None and size % per_step):
                near = max(1, round(size / per_step)) * per_step
                raise ValueError(
                    f"global_batch={size} is not a positive multiple of "
                    f"data.micro_batch={micro_batch} x data-parallel size {dp_size}; "
                    f"use global_batch={near} or another data.micro_batch"
                )
        consumed = ramp.samples(step) if consumed_samples is None else consumed_samples
        if consumed < 0:
            raise ValueError(f"consumed_samples={consumed} must not be negative")
        self.plan, self.step, self.consumed_samples = plan, step, consumed
        self.quarantine = Quarantine(0) if quarantine is None else quarantine
        self._ramp, self._micro_batch, self._skipped = ramp, micro_batch, skipped
        micro_batches = micro_batches or (lambda rows: rows // per_step)
        steps = _Steps(plan, ramp, micro_batch, dp_rank, dp_size, step, consumed, micro_batches)
        pipeline = wds.DataPipeline(steps.numbers, wds.split_by_worker, steps.make)
        self._items = ReadingProcesses(pipeline, workers) if workers else ReadingThread(pipeline)
        self._error: BaseException | None = None
        self._waiting = False

    @property
    def cursor(self) -> DataCursor:
        """The position after the last step that was returned; prefetched ones do not count."""
        consumed = self.consumed_samples
        quarantined = tuple(self.quarantine.rows)
        return DataCursor(consumed, self.plan.describe(consumed), quarantined, self._skipped)

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._error is not None:
            raise self._error
        self._waiting = True
        item = self._items.get()
        self._waiting = False
        if isinstance(item, BaseException):
            self._error = item
            raise item
        self.consumed_samples += self._ramp.size(self.step)
        self.step += 1
        self.quarantine.add(item.damaged)
        names = len(self.plan.source_names)
        sources = np.eye(names)[item.sources] if names else None
        return Batch.of(item.rows, sources).split(self._micro_batch)

    def waits_for(self) -> str:
        """Who is to give the step that `next` waits for; empty while it does not wait.

        May be called from any thread.
        """
        return self._items.waits_for() if self._waiting else ""

    def close(self) -> None:
        """End the thread or the processes and wait for them; the loader yields nothing more."""
        self._items.close()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class ValidLoader:
    """The batches of a split in order; every iteration starts at the beginning.

    Batch j of rank r holds the rows [(j * dp_size + r) * micro_batch, + micro_batch). Rows past the
    end are pad tokens with loss_mask 0, so that every rank has `len(self)` batches of full size and
    the rows with a loss are the same ones for every dp_size.

    Args:
        dataset: The split.
        micro_batch: Rows per batch.
        dp_rank: This rank among the data-parallel ranks.
        dp_size: Number of data-parallel ranks.
        max_rows: Only so many rows, over all ranks; None for the whole split.

    Attributes:
        num_rows: The rows with a loss, over all ranks, damaged ones included.
        damaged: Row and error of those that the last iteration found damaged, and gave without a
            loss (see `quarantine` of `TokenDataset`); of this rank.

    Raises:
        ValueError: `dp_rank` is outside `dp_size`, or `micro_batch` is less than 1.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        max_rows: int | None = None,
    ) -> None:
        _check_rank(dp_rank, dp_size)
        if micro_batch < 1:
            raise ValueError(f"data.micro_batch={micro_batch} must be at least 1")
        self.dataset, self.micro_batch = dataset, micro_batch
        self.dp_rank, self.dp_size = dp_rank, dp_size
        rows = dataset.num_rows
        self.num_rows = rows if max_rows is None else min(rows, max_rows)
        self.damaged: list[tuple[int, CorruptShardError]] = []

    def __len__(self) -> int:
        return -(-self.num_rows // (self.micro_batch * self.dp_size))

    def __iter__(self) -> Iterator[Batch]:
        self.damaged = []
        for number in range(len(self)):
            first = (number * self.dp_size + self.dp_rank) * self.micro_batch
            rows = np.arange(first, min(first + self.micro_batch, self.num_rows))
            found = self.dataset.read(rows)
            self.damaged += [(int(rows[place]), error) for place, error in found.damaged]
            yield Batch.of(found.padded(self.micro_batch, self.dataset.manifest.pad_id))
