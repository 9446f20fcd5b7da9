"""Which of many texts repeat an earlier one, by their hashes, in bounded memory."""

import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from xlstm_io.storage import temporary_path

BUCKET_ROWS = 1 << 20
"""About how many texts are compared at a time."""

_HELD_ROWS = 1 << 18
"""About how many texts are spread over the buckets at a time."""

_MAX_BUCKETS = 1 << 10


def find_repeated(
    parts: Iterable[tuple[np.ndarray, np.ndarray]], total: int, scratch: Path
) -> Iterator[np.ndarray]:
    """Numbers of the texts whose hash a text of a smaller number has.

    Args:
        parts: (numbers [n], hashes uint64 [n, 2]), numbers ascending over all parts.
        total: about how many texts there are.
        scratch: folder for the buckets of a large corpus: texts are first spread over files by
            their hash, then each file is sorted on its own.
    """
    buckets = min(_MAX_BUCKETS, 1 << max(0, total // BUCKET_ROWS).bit_length())
    if buckets == 1:
        held = [_table(*part) for part in parts]
        yield _repeated_in(np.concatenate(held) if held else np.empty((0, 3), np.uint64))
        return
    # A process that was killed may have left its folder, and had our number in another container.
    folder = temporary_path(scratch / f"buckets-{secrets.token_hex(4)}")
    folder.mkdir(parents=True)
    shift = np.uint64(64 - (buckets.bit_length() - 1))
    try:
        for table in _tables(parts):
            bucket = (table[:, 0] >> shift).astype(np.int64)
            order = np.argsort(bucket, kind="stable")
            table, bucket = table[order], bucket[order]
            present, first = np.unique(bucket, return_index=True)
            for number, rows in zip(present, np.split(table, first[1:]), strict=True):
                with open(folder / str(number), "ab") as file:
                    file.write(rows.tobytes())
        for path in folder.iterdir():
            yield _repeated_in(np.fromfile(path, np.uint64).reshape(-1, 3))
    finally:
        shutil.rmtree(folder)


def _tables(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
    """The parts in order, many together: small files would write a few rows into each bucket."""
    held: list[np.ndarray] = []
    rows = 0
    for part in parts:
        held.append(_table(*part))
        rows += len(held[-1])
        if rows >= _HELD_ROWS:
            yield np.concatenate(held)
            held, rows = [], 0
    if held:
        yield np.concatenate(held)


def _table(numbers: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    return np.column_stack([hashes, numbers.astype(np.uint64)])


def _repeated_in(table: np.ndarray) -> np.ndarray:
    table = table[np.lexsort((table[:, 1], table[:, 0]))]  # stable: equal texts stay in order
    repeated = (table[1:, :2] == table[:-1, :2]).all(axis=1)
    return np.sort(table[1:, 2][repeated]).astype(np.int64)
