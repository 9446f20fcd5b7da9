"""The global order of training: sample number -> (epoch, row), a pure function of the seed.

No list of indices is kept and no iterator state: a Feistel network is a permutation of [0, 4^w)
for every round function, and walking its cycles until the value falls below ``num_rows`` makes it
a permutation of the rows. So each epoch visits each row once, in an order of its own, and a run
continues at any sample number at the same cost as at zero.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_U64 = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijective 64-bit mixer (the finaliser of splitmix64), element-wise on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    state = np.array([seed & _U64, epoch & _U64], np.uint64)
    base = _mix(_mix(state[:1]) + state[1:] + np.uint64(0x9E3779B97F4A7C15))
    return _mix(base + np.arange(1, _ROUNDS + 1, dtype=np.uint64))


def permute(index: np.ndarray, size: int, *, seed: int, epoch: int) -> np.ndarray:
    """Image of ``index`` (any integer array with values in [0, size)) under a permutation.

    Args:
        size: number of rows; the permutation is of [0, size).
        seed: the run's data seed.
        epoch: each epoch has another permutation.

    Returns:
        int64 array of the shape of ``index``.
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


def locate(samples: np.ndarray, num_rows: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which (epoch, row) the global sample numbers are.

    Args:
        samples: int64 array of sample numbers, from 0.
        num_rows: rows of the training split.
        seed: the run's data seed.

    Returns:
        epochs and rows, int64 arrays of the shape of ``samples``.
    """
    samples = np.asarray(samples, np.int64)
    epochs, index = np.divmod(samples, num_rows)
    rows = np.empty_like(index)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = permute(index[here], num_rows, seed=seed, epoch=int(epoch))
    return epochs, rows
