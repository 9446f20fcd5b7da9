import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import RowOrder, WindowOrder, derive_seed, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 1000, 4097])
def test_permutation_of_every_size(size):
    for epoch in range(3):
        assert sorted(permute(np.arange(size), size, seed=5, epoch=epoch)) == list(range(size))


def test_epochs_and_seeds_differ_and_none_is_the_identity():
    orders = [
        tuple(permute(np.arange(100), 100, seed=seed, epoch=epoch))
        for seed in (0, 1, -1, 2**63, derive_seed(0, "a"), derive_seed(0, "b"))
        for epoch in (0, 1, 2)
    ]
    assert len(set(orders)) == len(orders) and tuple(range(100)) not in orders


def test_consecutive_indices_look_random():
    size = 4000
    order = permute(np.arange(size), size, seed=0, epoch=0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.05
    halves = np.histogram(order[: size // 2], bins=20, range=(0, size))[0]
    assert ((halves - 100) ** 2 / 100).sum() < 45  # chi-square, 19 degrees of freedom


ORDERS = {
    "row": lambda sizes, seed: RowOrder(sum(sizes), seed),
    "window": lambda sizes, seed: WindowOrder(np.array(sizes), 3, seed),
}


@pytest.mark.parametrize("kind", ORDERS)
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=11), st.integers(0, 2**64))
def test_each_epoch_visits_each_row_once_however_it_is_asked(kind, sizes, seed):
    order, total = ORDERS[kind](sizes, seed), sum(sizes)
    indices = np.arange(3 * total)
    rows = order.rows(indices)
    for epoch in range(3):
        assert sorted(rows[epoch * total : (epoch + 1) * total]) == list(range(total))
    slices = [ORDERS[kind](sizes, seed).rows(part) for part in np.array_split(indices, 7)]
    assert (np.concatenate(slices) == rows).all()
    shape = np.arange(3 * total).reshape(3, total)
    assert (order.rows(shape) == rows[shape]).all()


def test_a_window_reads_its_shards_and_no_others():
    sizes = [30, 50, 10, 40, 20, 60, 5]
    order, shard_of = WindowOrder(np.array(sizes), 3, seed=4), np.repeat(np.arange(7), sizes)
    seen = []
    for epoch in range(2):
        shards = shard_of[order.rows(np.arange(sum(sizes)) + epoch * sum(sizes))]
        firsts = list(dict.fromkeys(shards.tolist()))
        groups = [set(firsts[:3]), set(firsts[3:6]), set(firsts[6:])]
        start = 0
        for group in groups:
            count = sum(sizes[shard] for shard in group)
            assert set(shards[start : start + count].tolist()) == group
            inside = shards[start : start + count]
            if len(group) > 1:
                assert (np.diff(inside) != 0).sum() > 2 * len(group), "rows are mixed"
            start += count
        seen.append([sorted(group) for group in groups])
    assert seen[0] != seen[1], "another epoch groups the shards anew"


@pytest.mark.parametrize("kind", ORDERS)
def test_far_samples_are_as_good_as_near_ones(kind):
    order = ORDERS[kind]([10**7 + 7, 10**7, 10**7 + 1, 10**7 + 3], 1)
    rows = order.rows(np.arange(10**13, 10**13 + 64))
    assert len(set(rows.tolist())) == 64 and rows.max() < order.size


def test_order_is_pinned():
    """Checkpoints rely on it: another order would repeat and skip samples after an update."""
    assert RowOrder(10, 0).rows(np.arange(12)).tolist() == [6, 1, 3, 0, 4, 8, 7, 2, 9, 5, 2, 5]
    assert WindowOrder(np.array([3, 4, 2, 3]), 2, 0).rows(np.arange(14)).tolist() == PINNED


PINNED = [11, 7, 9, 10, 8, 2, 5, 3, 6, 1, 4, 0, 4, 7]
