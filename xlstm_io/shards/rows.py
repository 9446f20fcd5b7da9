"""Rows of tokens in a block: where documents begin, what is padding, and which positions count.

Segments, flags and labels: see `xlstm_io.shards.shard`.
"""

from dataclasses import dataclass

import numpy as np

CONTINUATION = 1 << 31
PADDING = 1 << 30
POSITION_MASK = PADDING - 1
NO_DOCUMENT = (1 << 32) - 1


def token_dtype(vocab_size: int) -> np.dtype:
    """Little-endian storage type of ids below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 65_535 else np.dtype("<u4")


def no_label(dtype: np.dtype | str) -> int:
    """The stored label of a position without a loss; `token_dtype` leaves this value to no id."""
    return int(np.iinfo(np.dtype(dtype)).max)


@dataclass(frozen=True)
class Block:
    """A block of packed rows.

    Attributes:
        tokens: `[rows, row_tokens]`, of the stored type.
        offsets: uint32 `[rows + 1]`: the segments of row r are `offsets[r]` to `offsets[r + 1]`.
        segments: uint32, `position | flags` of each segment.
        documents: uint32. best_fit: the document of each segment (NO_DOCUMENT: padding). concat:
            empty.
        labels: `[rows, row_tokens - 1]`, of the stored type, `no_label` where there is no loss.
            None: the label of a token is the next one, as `row_masks` says.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    segments: np.ndarray
    documents: np.ndarray
    labels: np.ndarray | None = None

    def doc_bytes(self) -> bytes:
        """Payload of the `.doc` member."""
        parts = np.concatenate([self.offsets, self.segments, self.documents])
        return parts.astype("<u4", copy=False).tobytes()

    def segment_rows(self) -> np.ndarray:
        """The row of each segment, int64 `[segments]`."""
        offsets = self.offsets.astype(np.int64)
        return np.repeat(np.arange(len(self.tokens)), offsets[1:] - offsets[:-1])


def parse_block(
    tok: bytes, doc: bytes, row_tokens: int, dtype: np.dtype | str, lab: bytes | None = None
) -> Block:
    """Turn the payloads of a `.tok` and a `.doc` member, and of a `.lab` member, back into a Block.

    A plain `webdataset` pipeline decodes its samples with it, too.

    Args:
        tok: payload of the `.tok` member.
        doc: payload of the `.doc` member.
        row_tokens: tokens of a row.
        dtype: stored token type, as the manifest names it.
        lab: payload of the `.lab` member, where there is one.

    Raises:
        ValueError: the sizes of the members do not fit together.
    """
    stored = np.dtype(dtype).newbyteorder("<")
    tokens = np.frombuffer(tok, stored).reshape(-1, row_tokens)
    labels = None if lab is None else np.frombuffer(lab, stored).reshape(len(tokens), -1)
    numbers = np.frombuffer(doc, "<u4")
    first = len(tokens) + 1
    if len(numbers) < first:
        raise ValueError(f"{len(numbers)} offsets for {len(tokens)} rows")
    last = first + int(numbers[first - 1])
    return Block(tokens, numbers[:first], numbers[first:last], numbers[last:], labels)


def block_problem(block: Block, vocab_size: int, *, best_fit: bool) -> str:
    """What is wrong with the numbers in a block; empty if its rows can be used.

    Args:
        block: from `parse_block`.
        vocab_size: of the tokenizer.
        best_fit: whether its segments belong to documents that the block names.
    """
    offsets, segments = block.offsets.astype(np.int64), block.segments
    if block.tokens.size and int(block.tokens.max()) >= vocab_size:
        return f"the id {block.tokens.max()}, which is not below vocab_size={vocab_size}"
    if offsets[0] != 0 or offsets[-1] != len(segments) or (np.diff(offsets) < 1).any():
        return "offsets of rows that do not ascend from 0 to the number of segments"
    if len(block.documents) != (len(segments) if best_fit else 0):
        return f"{len(block.documents)} documents of {len(segments)} segments"
    position = (segments & np.uint32(POSITION_MASK)).astype(np.int64)
    steps = np.diff(position, prepend=-1)
    steps[offsets[:-1]] = 1  # a row begins anew
    if (position >= block.tokens.shape[1]).any() or position[offsets[:-1]].any():
        return "segments that lie outside their rows"
    if (steps < 1).any():
        return "segments that do not ascend in their rows"
    if block.labels is not None:
        given = block.labels[block.labels != no_label(block.labels.dtype)]
        if given.size and int(given.max()) >= vocab_size:
            return f"the label {given.max()}, which is not below vocab_size={vocab_size}"
    return ""


def row_masks(
    rows: np.ndarray, segments: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """What the segments of some rows mean to the loss and to the cells.

    Args:
        rows: for each segment, which row (0-based) it belongs to.
        segments: `position | flags` of each.
        shape: (number of rows, seq_len).

    Returns:
        loss_mask float32 [rows, seq_len], 0 where the target belongs to another document or is
        padding; boundaries bool [rows, seq_len], True at the first token of a document or of a
        document part that another document precedes in the row.
    """
    loss_mask = np.ones(shape, np.float32)
    boundaries = np.zeros(shape, bool)
    position = (segments & POSITION_MASK).astype(np.int64)
    padding = (segments & PADDING) != 0
    # A continuation inside a row follows another document, just like a start.
    starts = ~padding & (((segments & CONTINUATION) == 0) | (position > 0))

    inside = starts & (position < shape[1])
    boundaries[rows[inside], position[inside]] = True
    crossed = starts & (position > 0)  # the position before a start would predict across documents
    loss_mask[rows[crossed], position[crossed] - 1] = 0.0
    for row, start in zip(rows[padding], position[padding], strict=True):
        loss_mask[row, max(start - 1, 0) :] = 0.0
    return loss_mask, boundaries
