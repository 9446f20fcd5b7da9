"""Packing documents into rows of seq_len + 1 tokens, in one of two ways.

`concat` chops one long stream. Rows overlap by one token, so that the last target of a row is the
first input of the next and no target is lost; a document cut by a row's end continues in the next
row, marked CONTINUATION.

`best_fit` keeps documents whole where a row can hold them (Ding et al. 2024, "Fewer Truncations
Improve Language Modeling"): only a document longer than a row is cut, into as few parts as
possible, and rows are filled up with padding. A part after a cut begins with the last token of the
part before.

Both take documents with labels, too: an array [2, n] of tokens and labels in place of one [n] of
tokens. All is cut along the last axis, so a label stays with its token.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from xlstm_io.shards.manifest import ShardEntry, place_of
from xlstm_io.shards.rows import CONTINUATION, NO_DOCUMENT, PADDING, Block, no_label
from xlstm_io.shards.shard import default_block_rows, index_path
from xlstm_io.shards.writer import ShardWriter

_BUFFER_PARTS = 10_000
_BUFFER_TOKENS = 1 << 23
_OPEN_ROWS = 1_024


def as_stored(ids: np.ndarray, bos_id: int, eos_id: int, dtype: np.dtype) -> np.ndarray:
    """A document's tokens as they are stored: [bos] ids [eos]."""
    tokens = np.empty(len(ids) + 2, dtype)
    tokens[0], tokens[1:-1], tokens[-1] = bos_id, ids, eos_id
    return tokens


def with_labels(tokens: np.ndarray, learnt: np.ndarray) -> np.ndarray:
    """A document with the next token as the label where that is to be learnt.

    Args:
        tokens: [n], as `as_stored` gives them.
        learnt: bool [n]: whether the loss of predicting this token counts.

    Returns:
        [2, n], tokens and labels.
    """
    labels = np.full_like(tokens, no_label(tokens.dtype))
    labels[:-1][learnt[1:]] = tokens[1:][learnt[1:]]
    return np.stack([tokens, labels])


def _padding(pad_id: int, labels: bool, dtype: np.dtype) -> np.ndarray:
    """What fills up rows, [] without and [2, 1] with labels."""
    return np.array([[pad_id], [no_label(dtype)]] if labels else pad_id, dtype)


def _count_targets(document: np.ndarray) -> int:
    """The labels of a document; without them all tokens but the first are targets."""
    if document.ndim == 1:
        return len(document) - 1
    return int((document[1] != no_label(document.dtype)).sum())


def _block(rows: np.ndarray, offsets: Any, segments: Any, documents: Any) -> Block:
    """A block of rows [n, seq_len + 1], or of rows with labels [2, n, seq_len + 1]."""
    offsets, segments = np.asarray(offsets, np.uint32), np.asarray(segments, np.uint32)
    documents = np.asarray(documents, np.uint32)
    if rows.ndim == 2:
        return Block(rows, offsets, segments, documents)
    # Nothing is predicted from the last token of a row: it begins the next one, or ends a document.
    labels = np.ascontiguousarray(rows[1, :, :-1])
    return Block(rows[0], offsets, segments, documents, labels)


class ConcatPacker:
    """Collects documents and yields blocks of `block_rows` rows; the last one is shorter.

    Args:
        seq_len: inputs per row; rows hold seq_len + 1 tokens.
        block_rows: rows per block.
        dtype: stored token type.
        pad_id: fills up the last row.
        labels: whether documents have labels.
    """

    def __init__(
        self, seq_len: int, block_rows: int, dtype: np.dtype, pad_id: int, labels: bool = False
    ):
        self.seq_len, self.block_rows = seq_len, block_rows
        self._pad = _padding(pad_id, labels, dtype)
        self.docs = self.tokens = self.targets = self.pad_tokens = 0
        self._parts: list[np.ndarray] = []
        self._starts: list[int] = []
        self._length = 0  # tokens in _parts; _starts counts from the first of them

    def add(self, tokens: np.ndarray) -> Iterator[Block]:
        """Append one document (of `as_stored`); yields the blocks that it completes."""
        self._starts.append(self._length)
        self._parts.append(tokens)
        self.docs += 1
        self.tokens += tokens.shape[-1]
        self.targets += _count_targets(tokens)
        self._length += tokens.shape[-1]
        if self._length > self.block_rows * self.seq_len:
            yield from self._full_blocks()

    def finish(self) -> Iterator[Block]:
        """Yield the last, short block; its last row is padded."""
        if self._length > 1:
            rows = -(-(self._length - 1) // self.seq_len)
            self.pad_tokens = rows * self.seq_len + 1 - self._length
            padding = np.repeat(np.atleast_1d(self._pad), self.pad_tokens, axis=-1)
            stream = np.concatenate([*self._parts, padding], axis=-1)
            starts = np.array(self._starts, np.int64)
            yield self._block(stream, starts, rows, self._length)
        self._parts, self._starts, self._length = [], [], 0

    def _full_blocks(self) -> Iterator[Block]:
        stream = np.concatenate(self._parts, axis=-1)
        starts = np.array(self._starts, np.int64)
        step = self.block_rows * self.seq_len
        first = 0
        while stream.shape[-1] - first > step:
            inside = starts[(starts >= first) & (starts <= first + step)] - first
            yield self._block(stream[..., first : first + step + 1], inside, self.block_rows)
            first += step
        self._parts = [stream[..., first:].copy()]
        self._starts = (starts[starts >= first] - first).tolist()
        self._length = stream.shape[-1] - first

    def _block(
        self, stream: np.ndarray, starts: np.ndarray, rows: int, padding_at: int | None = None
    ) -> Block:
        """Cut `stream` [..., rows * seq_len + 1] into rows; `starts` are the documents' in it."""
        s = self.seq_len
        windows = np.lib.stride_tricks.sliding_window_view(stream, s + 1, axis=-1)
        tokens = np.ascontiguousarray(windows[..., ::s, :])
        row, position = np.divmod(starts, s)
        own = row < rows
        # A start at a row's first position is also the overlapping last position of the row before:
        # there it says that this last target belongs to another document.
        shared = (position == 0) & (row > 0)
        unstarted = np.setdiff1d(np.arange(rows), row[position == 0])
        entries_row = [row[own], row[shared] - 1, unstarted]
        entries = [position[own], np.full(shared.sum(), s), np.full(len(unstarted), CONTINUATION)]
        if padding_at is not None and padding_at < stream.shape[-1]:
            entries_row.append(np.array([rows - 1]))
            entries.append(np.array([(padding_at - (rows - 1) * s) | PADDING]))
        owner = np.concatenate(entries_row).astype(np.int64)
        segments = np.concatenate(entries).astype(np.uint32)
        order = np.lexsort((segments & np.uint32(PADDING - 1), owner))
        offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=rows))])
        return _block(tokens, offsets, segments[order], ())


class _DocumentPart(NamedTuple):
    document: int  # number within the shard
    continues: bool
    tokens: np.ndarray

    @property
    def length(self) -> int:
        return self.tokens.shape[-1]


class BestFitPacker:
    """Collects documents and yields blocks of `block_rows` rows; the last one is shorter.

    Document parts are buffered and sorted by length, longest first (Best-Fit-Decreasing). Each is
    put into the row in which it leaves the least free space. Rows with free space stay open for the
    next buffer; memory is bounded by the constants above. The free space of the open rows is one
    int used as a set of bits, so finding the best fit is a shift and a count instead of a search
    tree.

    Args:
        seq_len: inputs per row; rows hold seq_len + 1 tokens.
        block_rows: rows per block.
        dtype: stored token type.
        pad_id: fills up the rows.
        labels: whether documents have labels.
    """

    def __init__(
        self, seq_len: int, block_rows: int, dtype: np.dtype, pad_id: int, labels: bool = False
    ):
        self.row_tokens, self.block_rows = seq_len + 1, block_rows
        self._pad = _padding(pad_id, labels, dtype)
        self.docs = self.tokens = self.targets = self.pad_tokens = 0
        self._buffer: list[_DocumentPart] = []
        self._buffered_tokens = 0
        self._open: dict[int, list[list[_DocumentPart]]] = {}  # rows by their free space
        self._open_rows = 0
        self._free = 0  # bit c is set where _open[c] has a row
        self._rows: list[list[_DocumentPart]] = []  # done, not yet in a block

    def add(self, tokens: np.ndarray) -> Iterator[Block]:
        """Append one document (of `as_stored`); yields the blocks that it completes."""
        for first in range(0, tokens.shape[-1] - 1, self.row_tokens - 1):
            # Its own copy: a short rest must not keep a long document in memory.
            kept = tokens[..., first : first + self.row_tokens].copy()
            part = _DocumentPart(self.docs, first > 0, kept)
            if part.length == self.row_tokens:
                self._rows.append([part])
            else:
                self._buffer.append(part)
                self._buffered_tokens += part.length
        self.docs += 1
        self.tokens += tokens.shape[-1]
        self.targets += _count_targets(tokens)
        if len(self._buffer) >= _BUFFER_PARTS or self._buffered_tokens >= _BUFFER_TOKENS:
            self._place()
            limit = min(_OPEN_ROWS, max(1, _BUFFER_TOKENS // self.row_tokens))
            self._close_fullest(self._open_rows - limit)
        while len(self._rows) >= self.block_rows:
            yield self._block(self._rows[: self.block_rows])
            del self._rows[: self.block_rows]

    def finish(self) -> Iterator[Block]:
        """Yield what is left; the last block may be short."""
        self._place()
        self._close_fullest(self._open_rows)
        for first in range(0, len(self._rows), self.block_rows):
            yield self._block(self._rows[first : first + self.block_rows])
        self._rows = []

    def _place(self) -> None:
        self._buffer.sort(key=lambda part: -part.length)  # stable: ties in input order
        for part in self._buffer:
            size = part.length
            fitting = self._free >> size
            if fitting:
                space = size + (fitting & -fitting).bit_length() - 1
                row = self._take(space)
            else:
                space, row = self.row_tokens, []
            row.append(part)
            left = space - size
            if left < 2:  # the shortest part has two tokens
                self._rows.append(row)
            else:
                self._open.setdefault(left, []).append(row)
                self._open_rows += 1
                self._free |= 1 << left
        self._buffer, self._buffered_tokens = [], 0

    def _take(self, space: int) -> list[_DocumentPart]:
        rows = self._open[space]
        row = rows.pop()
        self._open_rows -= 1
        if not rows:
            self._free ^= 1 << space
        return row

    def _close_fullest(self, count: int) -> None:
        for _ in range(count):
            space = (self._free & -self._free).bit_length() - 1
            self._rows.append(self._take(space))

    def _block(self, rows: list[list[_DocumentPart]]) -> Block:
        shape = (*self._pad.shape[:-1], len(rows), self.row_tokens)
        tokens = np.broadcast_to(self._pad[..., None], shape).copy()
        offsets, segments, documents = [0], list[int](), list[int]()
        for number, row in enumerate(rows):
            position = 0
            for part in row:
                tokens[..., number, position : position + part.length] = part.tokens
                segments.append(position | (CONTINUATION if part.continues else 0))
                documents.append(part.document)
                position += part.length
            if position < self.row_tokens:
                segments.append(position | PADDING)
                documents.append(NO_DOCUMENT)
                self.pad_tokens += self.row_tokens - position
            offsets.append(len(segments))
        return _block(tokens, offsets, segments, documents)


Packing = Literal["concat", "best_fit"]
Packer = ConcatPacker | BestFitPacker


def make_packer(
    packing: Packing, seq_len: int, dtype: np.dtype, pad_id: int, labels: bool = False
) -> Packer:
    """The packer of a shard, with blocks of about 1 MiB.

    Args:
        packing: how documents are laid into rows.
        seq_len: inputs per row; rows hold seq_len + 1 tokens.
        dtype: stored token type.
        pad_id: fills up rows.
        labels: whether documents have labels, see the module.
    """
    block_rows = default_block_rows(seq_len + 1, dtype)
    if packing == "concat":
        return ConcatPacker(seq_len, block_rows, dtype, pad_id, labels)
    return BestFitPacker(seq_len, block_rows, dtype, pad_id, labels)


def write_shard(
    root: Path, path: str, documents: Iterable[np.ndarray], packer: Packer, *, bytes_in: int
) -> ShardEntry:
    """Pack documents into rows and write them as one shard.

    Args:
        root: folder of the shards.
        path: of the tar, relative to `root`.
        documents: each as `as_stored` or `with_labels`; an error among them leaves no file.
        packer: a new one.
        bytes_in: UTF-8 bytes of the documents' texts.

    Returns:
        The shard's entry for the manifest.
    """
    with ShardWriter(place_of(root, path)) as writer:
        for tokens in documents:
            for block in packer.add(tokens):
                writer.write(block)
        for block in packer.finish():
            writer.write(block)
        written = writer.close()
    return ShardEntry(
        path=path,
        index=index_path(Path(path)).as_posix(),
        rows=written.rows,
        tokens=packer.tokens,
        targets=packer.targets,
        pad_tokens=packer.pad_tokens,
        docs=packer.docs,
        bytes_in=bytes_in,
        bytes=written.bytes,
        xxh3=written.xxh3,
        index_xxh3=written.index_xxh3,
    )
