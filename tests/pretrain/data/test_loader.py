import gc
import itertools
import threading
import time

import numpy as np
import pytest
import torch

from pretrain.data import Batch, DataCursor, TokenDataset, TrainLoader, ValidLoader
from pretrain.data import loader as loader_module
from pretrain.data.order import locate


@pytest.fixture(scope="module")
def train(shards):
    return TokenDataset(shards, "train", seq_len=16)


@pytest.fixture(scope="module")
def valid(shards):
    return TokenDataset(shards, "valid", seq_len=16)


def steps(train, count, **kwargs):
    options = dict(seed=3, global_batch=8, micro_batch=2) | kwargs
    with TrainLoader(train, **options) as loader:
        return list(itertools.islice(loader, count))


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def global_batch(train, step, dp_size, micro_batch):
    """Samples of one step put back in order from all ranks."""
    parts = {}
    for rank in range(dp_size):
        micro = steps(train, step + 1, dp_rank=rank, dp_size=dp_size, micro_batch=micro_batch)[step]
        for place, batch in enumerate(micro):
            parts[place * dp_size + rank] = batch
    ordered = [parts[number] for number in sorted(parts)]
    return Batch(
        *(torch.cat(field) for field in zip(*(vars(b).values() for b in ordered), strict=True))
    )


def test_batches_are_the_rows_of_the_order(train):
    found = steps(train, 3)
    _, rows = locate(np.arange(24), train.num_rows, seed=3)
    tokens, mask, boundaries = train.read(rows)
    batches = [batch for step in found for batch in step]
    assert [len(step) for step in found] == [4, 4, 4]
    assert torch.equal(torch.cat([b.tokens for b in batches]), torch.tensor(tokens[:, :-1]))
    assert torch.equal(torch.cat([b.labels for b in batches]), torch.tensor(tokens[:, 1:]))
    assert torch.equal(torch.cat([b.loss_mask for b in batches]), torch.tensor(mask))
    assert torch.equal(torch.cat([b.boundaries for b in batches]), torch.tensor(boundaries))
    kinds = [t.dtype for t in vars(batches[0]).values()]
    assert kinds == [torch.int64, torch.int64, torch.float32, torch.bool]
    assert all(t.shape == (2, 16) and t.is_contiguous() for t in vars(batches[0]).values())


@pytest.mark.parametrize("dp_size, micro_batch", [(1, 8), (2, 2), (4, 2), (8, 1), (2, 4)])
def test_global_batch_does_not_depend_on_the_topology(train, dp_size, micro_batch):
    for step in (0, 2):
        assert same(
            global_batch(train, step, dp_size, micro_batch), global_batch(train, step, 1, 2)
        )


def test_resume_at_any_step_gives_the_same_batches(train):
    whole = steps(train, 40)  # more than one epoch of these rows
    for at in (1, 7, 31):
        for a, b in zip(steps(train, 40 - at, consumed_samples=8 * at), whole[at:], strict=True):
            assert all(same(x, y) for x, y in zip(a, b, strict=True))
    assert 40 * 8 > train.num_rows


def test_epoch_covers_every_row_once(train):
    count = train.num_rows
    found = steps(train, 2 * count, global_batch=1, micro_batch=1)
    keys = [tuple(step[0].tokens[0].tolist() + step[0].labels[0].tolist()) for step in found]
    everything = train.read(np.arange(count))[0]
    expected = sorted(tuple(row[:-1].tolist() + row[1:].tolist()) for row in everything)
    assert sorted(keys[:count]) == sorted(keys[count:]) == expected
    assert keys[:count] != keys[count:]


def test_cursor_counts_what_was_handed_out(train):
    with TrainLoader(train, seed=0, global_batch=4, micro_batch=2) as loader:
        assert loader.cursor == DataCursor(0, train.manifest.hash)
        next(loader)
        time.sleep(0.2)  # prefetching goes on
        assert loader.cursor.consumed_samples == 4
        assert DataCursor.from_dict(loader.cursor.to_dict()) == loader.cursor
        assert loader.epoch == pytest.approx(4 / train.num_rows)


def test_resume_is_fast_anywhere(train):
    steps(train, 1)
    start = time.process_time()
    steps(train, 1, consumed_samples=10**12)
    assert time.process_time() - start < 0.05


def test_error_in_the_thread_reaches_the_consumer(train, monkeypatch):
    def fail(self, first_sample):
        if first_sample == 8:
            raise OSError("the disk is gone")
        return [first_sample]

    monkeypatch.setattr(loader_module._Plan, "step", fail)
    loader = TrainLoader(train, seed=0, global_batch=8, micro_batch=8)
    assert next(loader) == [0]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(loader)
    loader.close()


def threads():
    return [t for t in threading.enumerate() if t.name == "train-loader"]


def test_thread_ends_with_close_and_with_the_loader(train):
    loader = TrainLoader(train, seed=0, global_batch=2, micro_batch=2)
    assert not threads()  # nothing runs before the first batch is asked for
    next(loader)
    assert len(threads()) == 1
    loader.close()
    assert not threads()
    with pytest.raises(StopIteration):
        next(loader)

    loader = TrainLoader(train, seed=0, global_batch=2, micro_batch=2)
    next(loader)
    del loader
    gc.collect()
    for _ in range(50):
        if not threads():
            break
        time.sleep(0.05)
    assert not threads()


def test_prefetch_is_bounded(train, monkeypatch):
    made = []
    monkeypatch.setattr(loader_module._Plan, "step", lambda self, first: made.append(first) or [])
    with TrainLoader(train, seed=0, global_batch=2, micro_batch=2) as loader:
        next(loader)
        time.sleep(0.3)
    assert len(made) <= loader_module._PREFETCH_STEPS + 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(global_batch=12, micro_batch=8), "global_batch=12 .* use data.global_batch=16"),
        (dict(global_batch=8, micro_batch=4, dp_size=4), "data-parallel size 4; use .*=16"),
        (dict(global_batch=8, micro_batch=0), "micro_batch=0"),
        (dict(global_batch=8, micro_batch=2, dp_rank=2, dp_size=2), "dp_rank=2"),
        (dict(global_batch=8, micro_batch=2, consumed_samples=-8), "consumed_samples=-8"),
    ],
)
def test_bad_arguments_say_what_to_use(train, change, message):
    with pytest.raises(ValueError, match=message):
        TrainLoader(train, seed=0, **change)


@pytest.mark.parametrize("dp_size, micro_batch", [(1, 1), (1, 7), (3, 4), (4, 64)])
def test_validation_walks_every_row_once(valid, dp_size, micro_batch):
    tokens, mask, _ = valid.read(np.arange(valid.num_rows))
    ranks = [
        list(ValidLoader(valid, micro_batch=micro_batch, dp_rank=rank, dp_size=dp_size))
        for rank in range(dp_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == len(ValidLoader(valid, micro_batch=micro_batch, dp_size=dp_size))
    order = [batch for together in zip(*ranks, strict=True) for batch in together]
    assert all(batch.tokens.shape == (micro_batch, 16) for batch in order)
    rows = torch.cat([batch.tokens for batch in order])
    masks = torch.cat([batch.loss_mask for batch in order])
    assert torch.equal(rows[: valid.num_rows], torch.tensor(tokens[:, :-1]))
    assert torch.equal(masks[: valid.num_rows], torch.tensor(mask))
    assert (rows[valid.num_rows :] == valid.manifest.pad_id).all()
    assert masks[valid.num_rows :].sum() == 0


def test_validation_can_be_walked_again(valid):
    loader = ValidLoader(valid, micro_batch=5)
    assert all(same(a, b) for a, b in zip(loader, loader, strict=True))


def test_batch_moves(valid):
    batch = next(iter(ValidLoader(valid, micro_batch=2)))
    assert same(batch.to("cpu"), batch)
