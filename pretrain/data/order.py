"""The order of one source: sample index -> row, a pure function of the seed.

No list of indices and no iterator state is kept. A Feistel network is a permutation of [0, 4^w)
for every round function, and walking its cycles until the value falls below `size` makes it a
permutation of [0, size). So each epoch visits each row once, in an order of its own, and a run
continues at any sample number at the same cost as at zero.

`RowOrder` permutes all rows. That mixes best, and costs a random read of a few KB for each row.
`WindowOrder` permutes the shards, and the rows inside windows of a few neighbouring shards. The
files of a window are read once and as a whole, which suits object stores and parallel file systems.
"""

from collections import OrderedDict
from typing import Protocol

import numpy as np
import xxhash

_ROUNDS = 6
_U64 = (1 << 64) - 1
_EPOCHS_KEPT = 2  # shard orders that a WindowOrder keeps; a batch rarely spans more epochs


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijective 64-bit mixer (the finaliser of splitmix64), element-wise on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    state = np.array([seed & _U64, epoch & _U64], np.uint64)
    base = _mix(_mix(state[:1]) + state[1:] + np.uint64(0x9E3779B97F4A7C15))
    return _mix(base + np.arange(1, _ROUNDS + 1, dtype=np.uint64))


def derive_seed(seed: int, *words: str | int) -> int:
    """A 64-bit seed that differs for everything that `words` name."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, (seed, *words))).encode())


def permute(index: np.ndarray, size: int, *, seed: int, epoch: int) -> np.ndarray:
    """Apply a permutation of [0, size).

    Args:
        index: Integer array with values in [0, size).
        size: Number of rows.
        seed: Chooses the family of permutations.
        epoch: Chooses the permutation; each epoch has another one.

    Returns:
        Int64 array of the shape of `index`.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    keys = _round_keys(seed, epoch)
    value = np.asarray(index).astype(np.uint64).ravel()
    pending = np.arange(len(value))
    while len(pending):
        walk = value[pending]
        left, right = walk >> half_bits, walk & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        value[pending] = (left << half_bits) | right
        pending = pending[value[pending] >= size]
    return value.astype(np.int64).reshape(np.shape(index))


class Order(Protocol):
    """Which row of a source each sample index means.

    Attributes:
        size: Samples of one epoch.
    """

    size: int

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Row numbers, int64, in the shape of `indices`, which count from 0 over all epochs."""


class RowOrder:
    """Every epoch is another permutation of all rows.

    Args:
        num_rows: Rows of the source.
        seed: Chooses the family of permutations.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        self.size, self.seed = num_rows, seed

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """See `Order`."""
        epochs, index = np.divmod(np.asarray(indices, np.int64), self.size)
        rows = np.empty_like(index)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = permute(index[here], self.size, seed=self.seed, epoch=epoch)
        return rows


class WindowOrder:
    """Every epoch permutes the shards, and the rows within each window of consecutive shards.

    Args:
        shard_rows: Rows of each shard, in the order in which the rows are numbered.
        window: Shards per window. A window is read to its end before the next begins, so a process
            has at most this many files of the source open (twice, where a batch spans two).
        seed: Chooses the family of permutations.
    """

    def __init__(self, shard_rows: np.ndarray, window: int, seed: int) -> None:
        self._shard_rows = np.asarray(shard_rows, np.int64)
        self._first_row = np.concatenate([[0], np.cumsum(self._shard_rows)])
        self.window, self.seed = window, seed
        self.size = int(self._first_row[-1])
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """See `Order`."""
        epochs, index = np.divmod(np.asarray(indices, np.int64), self.size)
        rows = np.empty_like(index)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = self._rows_of_epoch(index[here], epoch)
        return rows

    def _rows_of_epoch(self, index: np.ndarray, epoch: int) -> np.ndarray:
        shards, first = self._shards(epoch)
        starts = first[:-1][:: self.window]  # where the windows begin in this epoch
        windows = np.searchsorted(starts, index, side="right") - 1
        places = np.empty_like(index)
        for window in np.unique(windows).tolist():
            here, start = windows == window, int(starts[window])
            size = int(first[min((window + 1) * self.window, len(shards))]) - start
            key = derive_seed(self.seed, "window", window)
            places[here] = start + permute(index[here] - start, size, seed=key, epoch=epoch)
        place = np.searchsorted(first, places, side="right") - 1
        return self._first_row[shards[place]] + places - first[place]

    def _shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in this epoch's order, and where each begins in it, with the end at last."""
        if epoch not in self._epochs:
            count = len(self._shard_rows)
            key = derive_seed(self.seed, "shards")
            shards = permute(np.arange(count), count, seed=key, epoch=epoch)
            first = np.concatenate([[0], np.cumsum(self._shard_rows[shards])])
            self._epochs[epoch] = (shards, first)
            if len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]
