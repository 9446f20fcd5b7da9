import gc
import itertools
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.util import register_after_fork
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from torch.utils.data._utils import worker as worker_module

from benchmarks.loader.synthetic_shards import write_shards
from pretrain.config.ramp import BatchRamp
from pretrain.data import (
    Batch,
    CorruptShardError,
    DataCursor,
    DataPlan,
    Phase,
    TokenDataset,
    TrainLoader,
    ValidLoader,
)
from pretrain.data.reading_ahead import PREFETCH_STEPS, ReadingProcesses
from tests.clean_processes import CLEAN
from xlstm_io.signals import STOP_SIGNALS


@pytest.fixture(scope="module")
def train(shards):
    return TokenDataset(shards, "train", seq_len=16)


@pytest.fixture(scope="module")
def valid(shards):
    return TokenDataset(shards, "valid", seq_len=16)


@pytest.fixture(scope="module")
def plan(train):
    return DataPlan.of(train, seed=3)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two sources in windows, the mixture changing at sample 50."""
    root = tmp_path_factory.mktemp("mixed")
    write_shards(root, {"a": [20, 11, 9, 14], "b": [13, 12]}, seq_len=16)
    sources = {name: TokenDataset(root, seq_len=16, source=name) for name in "ab"}
    phases = [Phase(0, {"a": 2, "b": 1}), Phase(50, {"a": 1, "b": 4})]
    return DataPlan(sources, phases, seed=9, shuffle="window", window_shards=2)


def steps(plan, count, *, ramp=None, **kwargs):
    options = dict(micro_batch=2) | kwargs
    with TrainLoader(plan, ramp or BatchRamp(8), **options) as loader:
        return list(itertools.islice(loader, count))


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def global_batches(plan, count, dp_size, **options):
    """Samples of each step put back in order from all ranks."""
    ranks = [steps(plan, count, dp_rank=r, dp_size=dp_size, **options) for r in range(dp_size)]
    found = []
    for parts in zip(*ranks, strict=True):
        ordered = [batch for together in zip(*parts, strict=True) for batch in together]
        fields = zip(*(vars(b).values() for b in ordered), strict=True)
        found.append(Batch(*(torch.cat(field) for field in fields)))
    return found


def test_batches_are_the_rows_of_the_order(train, plan):
    found = steps(plan, 3)
    rows = train.read(plan.locate(np.arange(24))[1])
    batches = [batch for step in found for batch in step]
    tokens = torch.tensor(rows.tokens.astype(np.int64))
    assert [len(step) for step in found] == [4, 4, 4]
    assert torch.equal(torch.cat([b.tokens for b in batches]), tokens[:, :-1])
    assert torch.equal(torch.cat([b.labels for b in batches]), tokens[:, 1:])
    loss_mask, boundaries = map(torch.tensor, rows.masks())
    assert torch.equal(torch.cat([b.loss_mask for b in batches]), loss_mask)
    assert torch.equal(torch.cat([b.boundaries for b in batches]), boundaries)
    kinds = [t.dtype for t in vars(batches[0]).values()]
    assert kinds == [torch.int64, torch.int64, torch.float32, torch.bool, torch.float64]
    *parts, sources = vars(batches[0]).values()
    assert all(t.shape == (2, 16) and t.is_contiguous() for t in parts)
    assert sources.shape == (2, 0), "all rows are of one source"


TOPOLOGIES = [
    # data-parallel size, micro-batch, worker processes
    (1, 8, 0), (2, 2, 0), (4, 2, 0), (8, 1, 0), (2, 4, 0), (1, 2, 1), (1, 4, 2), (2, 2, 2),
]  # fmt: skip


@pytest.mark.parametrize("dp_size, micro_batch, workers", TOPOLOGIES)
@pytest.mark.parametrize("source", ["plan", "mixed"])
def test_global_batches_do_not_depend_on_the_topology(
    request, source, dp_size, micro_batch, workers
):
    """Ranks of the other dimensions (tensor, pipeline, context) share dp_rank, hence the batch."""
    order = request.getfixturevalue(source)
    ramp = BatchRamp(16, [(2, 8), (3, 24)])
    expected = global_batches(order, 9, 1, ramp=ramp, micro_batch=1)
    assert [len(batch.tokens) for batch in expected] == [8] * 2 + [24] * 3 + [16] * 4
    options = dict(ramp=ramp, micro_batch=micro_batch, workers=workers)
    got = global_batches(order, 9, dp_size, **options)
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))
    got = global_batches(order, 5, dp_size, step=4, **options)  # in the middle of the ramp
    assert all(same(a, b) for a, b in zip(got, expected[4:], strict=True))


def test_resume_at_any_step_gives_the_same_batches(plan, train):
    whole = steps(plan, 40)  # more than one epoch of these rows
    for at in (1, 7, 31):
        for a, b in zip(steps(plan, 40 - at, step=at), whole[at:], strict=True):
            assert all(same(x, y) for x, y in zip(a, b, strict=True))
    assert 40 * 8 > train.num_rows


def test_a_changed_batch_size_continues_at_the_next_sample(mixed):
    """Steps count on, samples too: a cursor that no ramp of this run explains is believed."""
    expected = torch.cat([b.tokens for b in global_batches(mixed, 12, 1)])
    loader = TrainLoader(mixed, BatchRamp(4), micro_batch=4, step=5, consumed_samples=40)
    with loader:
        found = [next(loader)[0].tokens for _ in range(3)]
    assert torch.equal(torch.cat(found), expected[40:52])
    assert (loader.step, loader.consumed_samples) == (8, 52)


def test_epoch_covers_every_row_once(train, plan):
    count = train.num_rows
    found = steps(plan, 2 * count, ramp=BatchRamp(1), micro_batch=1)
    keys = [tuple(step[0].tokens[0].tolist() + step[0].labels[0].tolist()) for step in found]
    everything = train.read(np.arange(count)).tokens
    expected = sorted(tuple(row[:-1].tolist() + row[1:].tolist()) for row in everything)
    assert sorted(keys[:count]) == sorted(keys[count:]) == expected
    assert keys[:count] != keys[count:]


def test_cursor_counts_what_was_returned(plan):
    with TrainLoader(plan, BatchRamp(6, [(1, 4)]), micro_batch=2) as loader:
        assert loader.cursor == DataCursor(0, plan.describe(0))
        next(loader)
        time.sleep(0.2)  # prefetching goes on
        assert loader.cursor.consumed_samples == 4
        next(loader)
        assert loader.cursor.consumed_samples == 10
        assert DataCursor.from_dict(loader.cursor.to_dict()) == loader.cursor


@pytest.mark.parametrize("workers", [0, 2])
def test_error_while_reading_reaches_the_consumer_at_its_step(plan, monkeypatch, workers):
    failing = plan.locate(np.array([8]))[1][0]

    def fail(self, which, rows):
        if failing in rows:
            raise CorruptShardError("shard.tar", 3, 512, "xxh3 1", "xxh3 2")
        return type(self).whole_read(self, which, rows)

    monkeypatch.setattr(DataPlan, "whole_read", DataPlan.read, raising=False)
    monkeypatch.setattr(DataPlan, "read", fail)
    with TrainLoader(plan, BatchRamp(8), micro_batch=8, workers=workers) as loader:
        next(loader)
        for _ in range(2):
            with pytest.raises(CorruptShardError, match="block 3 at byte 512") as caught:
                next(loader)
            assert caught.value.expected == "xxh3 1"


def _train(shards, pipe):
    plan = DataPlan.of(TokenDataset(shards, "train", seq_len=16), seed=3)
    # DataLoader's own look at its parent, every 5 s, would end the workers too.
    worker_module.MP_STATUS_CHECK_INTERVAL = 600.0
    with TrainLoader(plan, BatchRamp(8), micro_batch=8, workers=2) as loader:
        next(loader)
        pipe.send([worker.pid for worker in multiprocessing.active_children()])
        time.sleep(600)


def test_worker_processes_end_with_a_trainer_that_is_killed(shards):
    here, there = CLEAN.Pipe()
    trainer = CLEAN.Process(target=_train, args=(shards, there))
    trainer.start()
    assert here.poll(60)
    workers = here.recv()
    assert len(workers) == 2
    trainer.kill()
    trainer.join()
    deadline = time.monotonic() + 120
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Left:
    """Garbage of this process, whose destructor ends another one."""

    def __init__(self):
        self.cycle, self.home = self, os.getpid()

    def __del__(self):
        if os.getpid() != self.home:
            os._exit(1)


def _collected():
    while True:
        yield gc.collect()


def test_worker_processes_leave_alone_what_the_trainer_has_left():
    """The group of a run that has ended is such garbage; see `tests.clean_processes`."""
    usual, here = gc.get_threshold(), set()
    gc.set_threshold(0)  # so that this process keeps it
    # In a worker any allocation may start a collection, from its first moment on.
    register_after_fork(here, lambda _: gc.isenabled() and gc.collect())
    try:
        Left()
        reading = ReadingProcesses(wds.DataPipeline(_collected), workers=1)
        reading.get()
        reading.close()
        assert gc.isenabled()
    finally:
        del here
        gc.set_threshold(*usual)
        gc.collect()


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_worker_processes_ignore_signals_and_end_with_the_loader(plan):
    loader = TrainLoader(plan, BatchRamp(8), micro_batch=8, workers=2)
    next(loader)
    workers = multiprocessing.active_children()
    assert len(workers) >= 2
    for worker, number in itertools.product(workers, STOP_SIGNALS):
        os.kill(worker.pid, number)  # Slurm signals every process of a step
    expected = steps(plan, 6, micro_batch=8)
    assert all(same(next(loader)[0], step[0]) for step in expected[1:])
    loader.close()
    for worker in workers:
        worker.join(60)  # one that was slow to end has been killed, which takes a moment too
    assert not any(worker.is_alive() for worker in workers)
    with pytest.raises(StopIteration):
        next(loader)


def test_a_worker_process_that_stands_still_is_named_while_it_is_waited_for(plan):
    with TrainLoader(plan, BatchRamp(8), micro_batch=8, workers=1) as loader:
        next(loader)
        assert loader.waits_for() == ""
        (worker,) = loader._items._workers
        os.kill(worker.pid, signal.SIGSTOP)
        # What it has read ahead is still given.
        waiting = threading.Thread(target=lambda: list(itertools.islice(loader, 20)))
        waiting.start()
        wanted = f"the loader's worker processes read: {worker.pid} (stopped)"
        deadline = time.monotonic() + 60
        while wanted not in loader.waits_for():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(worker.pid, signal.SIGCONT)
        waiting.join()
        assert loader.waits_for() == ""


def test_a_thread_that_is_waited_for_is_named(plan, monkeypatch):
    go_on, whole_read = threading.Event(), DataPlan.read
    monkeypatch.setattr(DataPlan, "read", lambda *args: go_on.wait() and whole_read(*args))
    with TrainLoader(plan, BatchRamp(2), micro_batch=2) as loader:
        waiting = threading.Thread(target=next, args=(loader,))
        waiting.start()
        deadline = time.monotonic() + 60
        while loader.waits_for() != "the next batch, which a thread reads":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        go_on.set()
        waiting.join()


def threads():
    return [t for t in threading.enumerate() if t.name == "train-loader"]


def test_thread_ends_with_close_and_with_the_loader(plan):
    loader = TrainLoader(plan, BatchRamp(2), micro_batch=2)
    assert not threads()  # nothing runs before the first batch is asked for
    next(loader)
    assert len(threads()) == 1
    loader.close()
    assert not threads()
    with pytest.raises(StopIteration):
        next(loader)

    loader = TrainLoader(plan, BatchRamp(2), micro_batch=2)
    next(loader)
    del loader
    gc.collect()
    for _ in range(2400):
        if not threads():
            break
        time.sleep(0.05)
    assert not threads()


def test_prefetch_is_bounded(plan, monkeypatch):
    made = []
    whole_read = DataPlan.read
    monkeypatch.setattr(DataPlan, "read", lambda *args: made.append(args) or whole_read(*args))
    with TrainLoader(plan, BatchRamp(2), micro_batch=2) as loader:
        next(loader)
        time.sleep(0.3)
    assert len(made) <= PREFETCH_STEPS + 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ramp=BatchRamp(12), micro_batch=8), "global_batch=12 .* use global_batch=16"),
        (dict(ramp=BatchRamp(16, [(2, 8)]), micro_batch=4, dp_size=4), "=8 .* size 4; use .*=16"),
        (dict(micro_batch=0), "micro_batch=0"),
        (dict(dp_rank=2, dp_size=2), "dp_rank=2"),
        (dict(consumed_samples=-8), "consumed_samples=-8"),
    ],
)
def test_bad_arguments_say_what_to_use(plan, change, message):
    with pytest.raises(ValueError, match=message):
        steps(plan, 0, **change)


@pytest.mark.parametrize("max_rows", [None, 5, 1000])
@pytest.mark.parametrize("dp_size, micro_batch", [(1, 1), (1, 7), (3, 4), (4, 64)])
def test_validation_walks_every_row_once(valid, dp_size, micro_batch, max_rows):
    num_rows = min(valid.num_rows, max_rows or valid.num_rows)
    whole = valid.read(np.arange(num_rows))
    tokens, mask = whole.tokens.astype(np.int64), whole.masks()[0]
    options = dict(micro_batch=micro_batch, dp_size=dp_size, max_rows=max_rows)
    ranks = [list(ValidLoader(valid, dp_rank=rank, **options)) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == len(ValidLoader(valid, **options))
    order = [batch for together in zip(*ranks, strict=True) for batch in together]
    assert all(batch.tokens.shape == (micro_batch, 16) for batch in order)
    rows = torch.cat([batch.tokens for batch in order])
    masks = torch.cat([batch.loss_mask for batch in order])
    assert torch.equal(rows[:num_rows], torch.tensor(tokens[:, :-1]))
    assert torch.equal(masks[:num_rows], torch.tensor(mask))
    assert (rows[num_rows:] == valid.manifest.pad_id).all()
    assert masks[num_rows:].sum() == 0


def test_validation_can_be_walked_again(valid):
    loader = ValidLoader(valid, micro_batch=5)
    assert all(same(a, b) for a, b in zip(loader, loader, strict=True))


def test_a_batch_moves_to_a_device(valid):
    batch = next(iter(ValidLoader(valid, micro_batch=2)))
    assert same(batch.to("cpu"), batch)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("size", "micro", "ranks"), [(8, 2, 3), (7, 2, 2), (2, 1, 3)])
def test_a_filled_batch_has_the_same_rows_and_the_rest_gives_no_loss(
    plan, size, micro, ranks, workers
):
    wanted = steps(plan, 3, ramp=BatchRamp(size), micro_batch=size)
    number = -(-size // (micro * ranks))
    filled = [
        steps(
            plan,
            3,
            ramp=BatchRamp(size),
            micro_batch=micro,
            dp_rank=rank,
            dp_size=ranks,
            workers=workers,
            micro_batches=lambda rows: number,
        )
        for rank in range(ranks)
    ]
    for step, (whole,) in enumerate(wanted):
        assert all(len(filled[rank][step]) == number for rank in range(ranks))
        order = [filled[rank][step][part] for part in range(number) for rank in range(ranks)]
        rows = {name: torch.cat([getattr(one, name) for one in order]) for name in vars(whole)}
        for name, expected in vars(whole).items():
            assert torch.equal(rows[name][:size], expected), name
        assert len(rows["tokens"]) == number * micro * ranks
        assert not rows["loss_mask"][size:].any()
