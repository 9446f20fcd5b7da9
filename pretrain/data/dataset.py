"""One split of a shard folder as an array of rows, readable at random."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

import numpy as np

from data_prep.shards import (
    CorruptShardError,
    Manifest,
    ShardFormatError,
    ShardReader,
    check_size,
    load_manifest,
    row_masks,
    token_dtype,
)
from pretrain.errors import UserError

_MAX_OPEN_SHARDS = 64  # file descriptors per split, whatever the size of the corpus


class DataError(UserError):
    """The data do not fit the run, or the folder is not usable; the message says what to change."""


class TokenDataset:
    """Rows of ``split`` in the folder ``path``, in the order in which they were written.

    Args:
        path: folder of shards (or its manifest.json).
        split: "train" or "valid".
        seq_len: the run's context length; must be the one the shards were packed for.

    Raises:
        DataError: no or damaged manifest, other seq_len, a split without rows, missing or
            truncated shards (sizes of all are compared at once; hashes when a block is read).
    """

    def __init__(self, path: str | os.PathLike, split: str = "train", *, seq_len: int):
        try:
            self.manifest: Manifest = load_manifest(path)
            self._entries = self.manifest.shards(split)
            for entry in self._entries:
                check_size(self.manifest.root, entry)
        except ShardFormatError as error:
            raise DataError(f"data.path: {error}") from error
        if self.manifest.seq_len != seq_len:
            raise DataError(
                f"data.seq_len={seq_len} is not the seq_len={self.manifest.seq_len} of the shards "
                f"in {path}; set data.seq_len={self.manifest.seq_len} or build shards with "
                f"--seq-len {seq_len}"
            )
        self._dtype = token_dtype(self.manifest.vocab_size)
        if self._dtype.name != self.manifest.dtype or self.manifest.row_tokens != seq_len + 1:
            raise DataError(
                f"{path}: dtype={self.manifest.dtype}, row_tokens={self.manifest.row_tokens} "
                f"contradict vocab_size={self.manifest.vocab_size}, seq_len={seq_len}; rebuild"
            )
        self.split, self.seq_len = split, seq_len
        self._first_row = np.cumsum([0, *(entry.rows for entry in self._entries)])
        self.num_rows = int(self._first_row[-1])
        if self.num_rows == 0:
            raise DataError(
                f"{path} has no {split!r} rows; rebuild with another --valid-fraction or more text"
            )
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._lock = threading.Lock()  # a prefetching thread and its owner may share the dataset

    def __len__(self) -> int:
        return self.num_rows

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows by number.

        Returns:
            tokens int64 [n, seq_len + 1]; loss_mask float32 and boundaries bool [n, seq_len].

        Raises:
            CorruptShardError: bytes on disk are not those that were written.
        """
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (0 <= rows.min() and rows.max() < self.num_rows):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of {self.num_rows}")
        tokens = np.empty((len(rows), self.seq_len + 1), self._dtype)
        segments = []
        shards = np.searchsorted(self._first_row, rows, side="right") - 1
        with self._lock:
            for i, (row, shard) in enumerate(zip(rows.tolist(), shards.tolist(), strict=True)):
                local = row - int(self._first_row[shard])
                segments.append(self._shard(shard).row(local, tokens[i]))
        owner = np.repeat(np.arange(len(rows)), [len(part) for part in segments])
        flat = np.concatenate(segments) if segments else np.empty(0, np.uint32)
        loss_mask, boundaries = row_masks(owner, flat, (len(rows), self.seq_len))
        return tokens.astype(np.int64), loss_mask, boundaries

    def close(self) -> None:
        """Close the open shards; reading afterwards opens them again."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()

    def __del__(self):
        if hasattr(self, "_lock"):
            self.close()

    def _shard(self, number: int) -> ShardReader:
        reader = self._open.get(number)
        if reader is None:
            if len(self._open) >= _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
            reader = ShardReader(
                self.manifest.root,
                self._entries[number],
                self.manifest.row_tokens,
                self.manifest.dtype,
            )
            self._open[number] = reader
        self._open.move_to_end(number)
        return reader


__all__ = ["CorruptShardError", "DataError", "TokenDataset"]
