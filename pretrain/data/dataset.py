"""One split of a shard folder as an array of rows, readable at random."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data.cache import CacheSettings, ShardCache
from xlstm_io.errors import ShardFormatError, UserError
from xlstm_io.remote import is_remote
from xlstm_io.shards.index import CorruptShardError
from xlstm_io.shards.manifest import Manifest, ShardEntry, load_manifest
from xlstm_io.shards.rows import PADDING, POSITION_MASK, no_label, row_masks, token_dtype
from xlstm_io.shards.shard import CheckedBlocks, ShardReader, check_sizes

log = logging.getLogger(__name__)

_MAX_OPEN_SHARDS = 64  # file descriptors per split, whatever the size of the corpus
_ALL_PADDING = np.array([PADDING], np.uint32)  # the segments of a row that is all padding


class DataError(UserError):
    """The data do not fit the run, or a folder cannot be used; the message says what to change."""


class NoRowsError(DataError):
    """A folder is in order but has no rows of the split that was asked for."""


@dataclass(frozen=True)
class Rows:
    """Rows as they were read, in the types that they have on disk.

    Attributes:
        tokens: `[n, seq_len + 1]` of the stored type.
        labels: `[n, seq_len]` of the same type, `no_label` where there is no loss. None: the label
            of a token is the next one, as the segments say.
        segments: Uint32, the segments of all rows (see `xlstm_io.shards.shard`).
        owner: Int64, the row among the n that each segment belongs to.
        damaged: `(place among the n, error)` of each row whose bytes on disk are not those that
            were written; here it is padding without a loss.
    """

    tokens: np.ndarray
    labels: np.ndarray | None
    segments: np.ndarray
    owner: np.ndarray
    damaged: list[tuple[int, CorruptShardError]]

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """loss_mask float32 and boundaries bool, each [n, seq_len]; see `row_masks`."""
        rows, row_tokens = self.tokens.shape
        loss_mask, boundaries = row_masks(self.owner, self.segments, (rows, row_tokens - 1))
        if self.labels is not None:
            loss_mask = (self.labels != no_label(self.labels.dtype)).astype(np.float32)
        return loss_mask, boundaries

    def ends(self) -> np.ndarray:
        """Int64 [n]: the position where the padding of each row begins, or seq_len."""
        ends = np.full(len(self.tokens), self.tokens.shape[1] - 1)
        padding = (self.segments & np.uint32(PADDING)) != 0
        position = (self.segments[padding] & np.uint32(POSITION_MASK)).astype(np.int64)
        ends[self.owner[padding]] = np.minimum(position, ends[self.owner[padding]])
        return ends

    def targets(self) -> np.ndarray:
        """Int64 [n, seq_len]: what each position is to predict; an id where there is no loss, too.

        The loss of every position is computed before the mask is applied.
        """
        if self.labels is None:
            return self.tokens[:, 1:].astype(np.int64)
        labelled = self.labels != no_label(self.labels.dtype)
        return np.where(labelled, self.labels, 0).astype(np.int64)

    def padded(self, rows: int, pad_id: int) -> Rows:
        """The same rows, followed by padding without a loss, `rows` in all."""
        missing, labels = rows - len(self.tokens), self.labels
        if labels is not None:
            none = no_label(labels.dtype)
            labels = np.pad(labels, ((0, missing), (0, 0)), constant_values=none)
        return Rows(
            np.pad(self.tokens, ((0, missing), (0, 0)), constant_values=pad_id),
            labels,
            np.concatenate([self.segments, np.repeat(_ALL_PADDING, missing)]),
            np.concatenate([self.owner, np.arange(len(self.tokens), rows)]),
            self.damaged,
        )


class TokenDataset:
    """The rows of one split of a folder of shards, in the order in which they were written.

    Args:
        path: Folder of shards (or its manifest.json), or its URL.
        split: "train" or "valid".
        seq_len: The run's context length; the shards must have been packed for it.
        source: One source of the folder; None for all of them.
        quarantine: Return damaged rows as padding without a loss instead of raising.
        cache: Where copies of the shards of a URL go.
        copy: Folder with the same files on a local disk, which are read in place of those in
            `path`. What is said of the dataset, but for damage, names `path`.
        check_files: Whether the sizes of all shards in `path` are compared here; of a `copy` they
            always are. Of many processes that read one folder, one is enough: all of them at once
            would ask the file system millions of times.

    Attributes:
        sources: The folder's sources that the rows are of, in row order.

    Raises:
        DataError: The manifest is missing or damaged, it has another seq_len, the source is
            unknown, the split has no rows, or shards are missing or truncated. Hashes are compared
            when a block of rows is read. With `quarantine`, and without `check_files`, a bad shard
            is found when one of its rows is read.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str = "train",
        *,
        seq_len: int,
        source: str | None = None,
        quarantine: bool = False,
        cache: CacheSettings | None = None,
        copy: str | None = None,
        check_files: bool = True,
    ) -> None:
        self.split, self.seq_len, self.source = split, seq_len, source
        self.quarantine = quarantine
        try:
            self._cache = ShardCache(str(path), cache) if is_remote(path) and cache else None
            self._read_from = self._cache.manifest if self._cache else load_manifest(copy or path)
            self.manifest: Manifest = self._read_from.at(Path(path)) if copy else self._read_from
            self._entries = self._select()
            if not quarantine and (check_files or copy):
                self._check_sizes()
        except ShardFormatError as error:
            raise DataError(str(error)) from error
        self.dtype = token_dtype(self.manifest.vocab_size)
        self._check(path)
        self.shard_rows = np.array([entry.rows for entry in self._entries], np.int64)
        self._first_row = np.concatenate([[0], np.cumsum(self.shard_rows)])
        self.num_rows = int(self._first_row[-1])
        parts = [
            (one.name, one.splits[split].rows)
            for one in self.manifest.sources
            if split in one.splits and source in (None, one.name)
        ]
        self.sources = [name for name, rows in parts if rows]
        self._source_ends = np.cumsum([rows for _, rows in parts if rows])
        if self.num_rows == 0:
            raise NoRowsError(
                f"{path} has no {split!r} rows; rebuild with another --valid-fraction or more text"
            )
        self.max_open = _MAX_OPEN_SHARDS
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._checked: dict[int, CheckedBlocks] = {}
        self._damaged: dict[tuple[int, int | None], CorruptShardError] = {}
        self._dropped: set[int] = set()  # shards whose copy in the cache was damaged
        self._lock = threading.Lock()  # a prefetching thread and its owner may share the dataset

    def __len__(self) -> int:
        return self.num_rows

    @property
    def targets_per_byte(self) -> float:
        """Tokens that have a loss, over bytes of text."""
        targets, size = (sum(getattr(e, k) for e in self._entries) for k in ("targets", "bytes_in"))
        return targets / max(1, size)

    def sources_of(self, rows: np.ndarray) -> np.ndarray:
        """Place in `sources` of the source of each row."""
        return np.searchsorted(self._source_ends, rows, side="right")

    def read(self, rows: np.ndarray) -> Rows:
        """Rows by number.

        Raises:
            CorruptShardError: Bytes on disk are not those that were written, and there is no
                `quarantine`.
        """
        return read_rows([self], np.zeros(len(rows), np.int64), rows)

    def fill(
        self,
        rows: np.ndarray,
        places: np.ndarray,
        tokens: np.ndarray,
        segments: list[np.ndarray],
        labels: np.ndarray | None = None,
    ) -> list[tuple[int, CorruptShardError]]:
        """Read rows into `tokens[places]`, `segments[places]` and, where given, `labels[places]`.

        They are read in the order in which they lie on disk. See `read_rows`.

        Returns:
            `(place, error)` of the damaged ones.
        """
        if len(rows) and not (0 <= rows.min() and rows.max() < self.num_rows):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of {self.num_rows}")
        on_disk = np.argsort(rows, kind="stable")
        rows, places = rows[on_disk], places[on_disk]
        shards = np.searchsorted(self._first_row, rows, side="right") - 1
        local = rows - self._first_row[shards]
        damaged = []
        with self._lock:
            for place, shard, row in zip(
                places.tolist(), shards.tolist(), local.tolist(), strict=True
            ):
                own = None if labels is None else labels[place]
                try:
                    segments[place] = self._row(shard, row, tokens[place], own)
                except CorruptShardError as error:
                    if not self.quarantine:
                        raise
                    tokens[place] = self.manifest.pad_id
                    segments[place] = _ALL_PADDING
                    if own is not None:
                        own[:] = no_label(own.dtype)
                    damaged.append((place, error))
        return damaged

    @property
    def open_files(self) -> int:
        """How many shards are open now; at most `max_open`."""
        return len(self._open)

    def close(self) -> None:
        """Close the open shards; reading afterwards opens them again."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()

    def _select(self) -> list[ShardEntry]:
        """The shards of this split and source, in row order."""
        if self.source is None:
            return self.manifest.shards(self.split)
        for source in self.manifest.sources:
            if source.name == self.source:
                part = source.splits.get(self.split)
                return [] if part is None else part.shards
        names = ", ".join(source.name for source in self.manifest.sources)
        raise ShardFormatError(
            f"{self.manifest.root} has no source {self.source!r}; it has {names}"
        )

    def _check_sizes(self) -> None:
        if self._cache is not None:
            self._cache.check_sizes(self._entries)
            return
        check_sizes(self._read_from.root, self._entries)

    def _check(self, path: str | os.PathLike) -> None:
        manifest, seq_len = self.manifest, self.seq_len
        if manifest.seq_len != seq_len:
            raise DataError(
                f"data.seq_len={seq_len} is not the seq_len={manifest.seq_len} of the shards "
                f"in {path}; set data.seq_len={manifest.seq_len} or build shards with "
                f"--seq-len {seq_len}"
            )
        if self.dtype.name != manifest.dtype or manifest.row_tokens != seq_len + 1:
            raise DataError(
                f"{path}: dtype={manifest.dtype}, row_tokens={manifest.row_tokens} "
                f"contradict vocab_size={manifest.vocab_size}, seq_len={seq_len}; rebuild"
            )

    def _row(
        self, shard: int, row: int, tokens: np.ndarray, labels: np.ndarray | None
    ) -> np.ndarray:
        """One row of a shard. What was found damaged once is not read again."""
        try:
            try:
                return self._read_row(shard, row, tokens, labels)
            except CorruptShardError as error:
                if not self._copied_again(shard, error):
                    raise
                return self._read_row(shard, row, tokens, labels)
        except CorruptShardError as error:
            self._damaged[shard, error.block] = error.with_traceback(None)
            raise

    def _read_row(
        self, shard: int, row: int, tokens: np.ndarray, labels: np.ndarray | None
    ) -> np.ndarray:
        if self._damaged:
            known = self._damaged.get((shard, None))
            if known is None:
                known = self._damaged.get((shard, self._shard(shard).block_of(row)))
            if known is not None:
                raise known
        own = labels if self.manifest.labels else None
        segments = self._shard(shard).row(row, tokens, own)
        if labels is not None and own is None:
            _label_by_the_next_token(tokens, segments, labels)
        return segments

    def _copied_again(self, shard: int, error: CorruptShardError) -> bool:
        """Whether the damage was in the copy of a remote shard, which is thrown away; once each."""
        cache = self._cache
        if cache is None or shard in self._dropped or not error.path.startswith(f"{cache.root}/"):
            return False
        log.warning(
            "%s: this copy is damaged (expected %s, got %s), and made again",
            *(error.path, error.expected, error.got),
        )
        self._dropped.add(shard)
        if shard in self._open:
            self._open.pop(shard).close()
        cache.drop(self._entries[shard])
        return True

    def _shard(self, number: int) -> ShardReader:
        reader = self._open.get(number)
        if reader is None:
            if len(self._open) >= self.max_open:
                self._open.popitem(last=False)[1].close()
            entry = self._entries[number]
            with contextlib.nullcontext() if self._cache is None else self._cache.holding(entry):
                reader = ShardReader(self._read_from, entry, self._checked.get(number))
            self._checked[number] = reader.checked
            self._open[number] = reader
        self._open.move_to_end(number)
        return reader


def read_rows(datasets: Sequence[TokenDataset], which: np.ndarray, rows: np.ndarray) -> Rows:
    """Rows of several datasets of one seq_len and token type, in the order asked for.

    Args:
        datasets: The datasets.
        which: For each row the place of its dataset in `datasets`.
        rows: For each row its number in that dataset.

    Raises:
        CorruptShardError: See `TokenDataset.read`.
    """
    rows = np.asarray(rows, np.int64)
    seq_len = datasets[0].seq_len
    tokens = np.empty((len(rows), seq_len + 1), datasets[0].dtype)
    labels = None
    if any(dataset.manifest.labels for dataset in datasets):
        labels = np.empty((len(rows), seq_len), tokens.dtype)
    segments = [_ALL_PADDING] * len(rows)
    damaged: list[tuple[int, CorruptShardError]] = []
    for number in np.unique(which).tolist():
        places = np.flatnonzero(which == number)
        damaged += datasets[number].fill(rows[places], places, tokens, segments, labels)
    owner = np.repeat(np.arange(len(rows)), np.array([len(part) for part in segments], np.int64))
    flat = np.concatenate(segments) if segments else np.empty(0, np.uint32)
    return Rows(tokens, labels, flat, owner, sorted(damaged, key=lambda item: item[0]))


def _label_by_the_next_token(tokens: np.ndarray, segments: np.ndarray, out: np.ndarray) -> None:
    """The labels that stand for a row of ordinary shards, beside rows that have labels."""
    loss_mask, _ = row_masks(np.zeros(len(segments), np.int64), segments, (1, len(out)))
    out[:] = np.where(loss_mask[0] > 0, tokens[1:], no_label(out.dtype))


__all__ = ["CorruptShardError", "DataError", "NoRowsError", "Rows", "TokenDataset", "read_rows"]
