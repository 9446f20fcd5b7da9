"""Packs samples into rows: several in a row where they fit, none cut, none at a row's last place.

The last of a row's `seq_len + 1` tokens is not an input, so a sample with a label at its end must
not reach it: that place is always padding.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from data_prep.synthetic.task import Samples, inside
from xlstm_io.shards.rows import NO_DOCUMENT, PADDING, Block, no_label
from xlstm_io.shards.shard import default_block_rows


def as_blocks(batches: Iterable[Samples], seq_len: int, dtype: np.dtype) -> Iterator[Block]:
    """The samples as blocks of rows of one shard; samples of one batch share rows.

    Args:
        batches: samples of at most `seq_len` tokens.
        seq_len: inputs of a row.
        dtype: stored token type.
    """
    size, documents = default_block_rows(seq_len + 1, dtype), 0
    held: list[Block] = []
    for batch in batches:
        held.append(_pack(batch, seq_len, dtype, documents))
        documents += len(batch)
        if sum(len(block.tokens) for block in held) >= size:
            joined = _joined(held)
            whole = len(joined.tokens) // size * size
            yield from (_rows(joined, first, first + size) for first in range(0, whole, size))
            held = [_rows(joined, whole, len(joined.tokens))] if whole < len(joined.tokens) else []
    if held:
        yield _joined(held)


def _pack(samples: Samples, seq_len: int, dtype: np.dtype, documents: int) -> Block:
    """One batch as one block; its samples are numbered from `documents` on."""
    row, start = assign(samples.lengths, seq_len)
    rows, count = int(row.max()) + 1, len(samples)
    tokens = np.zeros((rows, seq_len + 1), dtype)
    labels = np.full((rows, seq_len), no_label(dtype), dtype)
    sample, place = np.nonzero(inside(samples.lengths, samples.tokens.shape[1]))
    tokens[row[sample], start[sample] + place] = samples.tokens[sample, place]
    sample, place = np.nonzero(samples.labels >= 0)
    labels[row[sample], start[sample] + place] = samples.labels[sample, place]

    ends = np.zeros(rows, np.int64)
    np.maximum.at(ends, row, start + samples.lengths)
    owner = np.concatenate([row, np.arange(rows)])
    position = np.concatenate([start, ends])
    flags = np.concatenate([np.zeros(count, np.int64), np.full(rows, PADDING)])
    numbers = np.concatenate([documents + np.arange(count), np.full(rows, NO_DOCUMENT)])
    order = np.lexsort((position, owner))
    offsets = np.concatenate([[0], np.bincount(owner, minlength=rows).cumsum()])
    segments = (position | flags)[order].astype(np.uint32)
    return Block(
        tokens, offsets.astype(np.uint32), segments, numbers[order].astype(np.uint32), labels
    )


def assign(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and first position of each sample, rows filled from the longest sample on.

    The longest sample that is left begins a row, and the longest that fits goes on, until none
    does. Which lengths are left is an int used as a set of bits.
    """
    row, start = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    order = np.argsort(lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    bounds = counts.cumsum()
    left = {
        int(size): order[end - n : end].tolist()
        for size, n, end in zip(sizes, counts, bounds, strict=True)
    }
    there = sum(1 << size for size in left)
    number = 0
    while there:
        space = seq_len
        while fitting := there & ((2 << space) - 1):
            size = fitting.bit_length() - 1
            sample = left[size].pop()
            row[sample], start[sample] = number, seq_len - space
            space -= size
            if not left[size]:
                there ^= 1 << size
        number += 1
    return row, start


def _joined(blocks: list[Block]) -> Block:
    """The rows of several blocks as one."""
    ends = np.cumsum([0, *(len(block.segments) for block in blocks)])
    offsets = [block.offsets[:-1] + end for block, end in zip(blocks, ends[:-1], strict=True)]
    return Block(
        np.concatenate([block.tokens for block in blocks]),
        np.concatenate([*offsets, ends[-1:]]).astype(np.uint32),
        np.concatenate([block.segments for block in blocks]),
        np.concatenate([block.documents for block in blocks]),
        np.concatenate([block.labels for block in blocks if block.labels is not None]),
    )


def _rows(block: Block, first: int, last: int) -> Block:
    """Some rows of a block with labels."""
    begin, end = int(block.offsets[first]), int(block.offsets[last])
    labels = None if block.labels is None else block.labels[first:last]
    return Block(
        block.tokens[first:last],
        block.offsets[first : last + 1] - np.uint32(begin),
        block.segments[begin:end],
        block.documents[begin:end],
        labels,
    )
