"""Concat-and-chop packing: a stream of documents -> rows of seq_len + 1 tokens.

Rows overlap by one token, so that the last target of a row is the first input of the next and no
target is lost; a document cut by a row's end continues in the next row, marked CONTINUATION.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_prep.shards import CONTINUATION, PADDING, Block


class ConcatPacker:
    """Collects documents and yields blocks of ``block_rows`` rows; the last one is shorter.

    Args:
        seq_len: inputs per row; rows hold seq_len + 1 tokens.
        block_rows: rows per block.
        dtype: stored token type.
        bos_id, eos_id, pad_id: documents become ``[bos] tokens [eos]``; the last row is filled up
            with pad.
    """

    def __init__(
        self, seq_len: int, block_rows: int, dtype: np.dtype, *, bos_id: int, eos_id: int, pad_id
    ):
        self.seq_len, self.block_rows, self.dtype = seq_len, block_rows, dtype
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self.docs = self.tokens = self.pad_tokens = 0
        self._parts: list[np.ndarray] = []
        self._starts: list[int] = []
        self._length = 0  # tokens in _parts; _starts counts from the first of them

    def add(self, ids: list[int]) -> Iterator[Block]:
        """Append one document (ids without bos and eos); yields the blocks that it completes."""
        self._starts.append(self._length)
        self._parts.append(np.array([self.bos_id, *ids, self.eos_id], self.dtype))
        self.docs += 1
        self.tokens += len(ids) + 2
        self._length += len(ids) + 2
        if self._length > self.block_rows * self.seq_len:
            yield from self._full_blocks()

    def finish(self) -> Iterator[Block]:
        """Yield the last, short block; its last row is padded."""
        if self._length > 1:
            rows = -(-(self._length - 1) // self.seq_len)
            self.pad_tokens = rows * self.seq_len + 1 - self._length
            stream = np.concatenate([*self._parts, np.full(self.pad_tokens, self.pad_id)])
            starts = np.array(self._starts, np.int64)
            yield self._block(stream.astype(self.dtype), starts, rows, self._length)
        self._parts, self._starts, self._length = [], [], 0

    def _full_blocks(self) -> Iterator[Block]:
        stream, starts = np.concatenate(self._parts), np.array(self._starts, np.int64)
        step = self.block_rows * self.seq_len
        first = 0
        while len(stream) - first > step:
            inside = starts[(starts >= first) & (starts <= first + step)] - first
            yield self._block(stream[first : first + step + 1], inside, self.block_rows)
            first += step
        self._parts = [stream[first:].copy()]
        self._starts = (starts[starts >= first] - first).tolist()
        self._length = len(stream) - first

    def _block(self, stream, starts, rows: int, padding_at: int | None = None) -> Block:
        """Cut ``stream`` [rows * seq_len + 1] into rows; ``starts`` are the documents' in it."""
        s = self.seq_len
        tokens = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(stream, s + 1)[::s])
        row, position = np.divmod(starts, s)
        own = row < rows
        # A start at a row's first position is also the overlapping last position of the row before:
        # there it says that this last target belongs to another document.
        shared = (position == 0) & (row > 0)
        unstarted = np.setdiff1d(np.arange(rows), row[position == 0])
        entries_row = [row[own], row[shared] - 1, unstarted]
        entries = [position[own], np.full(shared.sum(), s), np.full(len(unstarted), CONTINUATION)]
        if padding_at is not None and padding_at < len(stream):
            entries_row.append([rows - 1])
            entries.append([(padding_at - (rows - 1) * s) | PADDING])
        owner = np.concatenate(entries_row).astype(np.int64)
        segments = np.concatenate(entries).astype(np.uint32)
        order = np.lexsort((segments & np.uint32(PADDING - 1), owner))
        offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=rows))])
        return Block(tokens, offsets.astype(np.uint32), segments[order])
