"""The shard format, owned here alone: tars of blocks of packed rows, with index and checksums.

Layout of a folder (every path in ``manifest.json`` is relative to it)::

    <source>/<split>/shard-00000042.tar       ustar, mtime 0: the same bytes on every build
        b000000.tok   little-endian uint16|uint32 [rows, seq_len + 1]
        b000000.doc   little-endian uint32: rows + 1 offsets, then the segments of each row
    <source>/<split>/shard-00000042.idx.npz   offsets, sizes and xxh3 of every block
    tokenizer/tokenizer.model                 the tokenizer travels with its ids
    manifest.json                             written last

A tar member is a block of rows (about 1 MiB), not one sequence: a header per 4 KB costs 25 %.
Plain ``webdataset`` reads the tars as samples ``{"tok": bytes, "doc": bytes}``; this module also
finds single rows by offset. Its readers never trust tarfile's end of file, which takes a damaged
header for the end of the archive: they read what the index lists and compare xxh3.

A *segment* of a row is ``position | flags``: where a document (or padding) starts in the row.
Position 0 always has one; CONTINUATION says that the document began in an earlier row, PADDING
that the rest of the row is padding.
"""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import xxhash

from data_prep.manifest import (
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    ShardFormatError,
    SourceEntry,
    SplitEntry,
    TokenizerEntry,
    load_manifest,
    write_atomic,
    write_manifest,
)

__all__ = [
    "CONTINUATION",
    "MANIFEST_NAME",
    "PADDING",
    "POSITION_MASK",
    "Block",
    "BlockIndex",
    "CorruptShardError",
    "Manifest",
    "ShardEntry",
    "ShardFormatError",
    "ShardReader",
    "ShardWriter",
    "SourceEntry",
    "SplitEntry",
    "TokenizerEntry",
    "check_size",
    "default_block_rows",
    "index_path",
    "load_manifest",
    "parse_block",
    "row_masks",
    "token_dtype",
    "write_atomic",
    "write_manifest",
]

CONTINUATION = 1 << 31
PADDING = 1 << 30
POSITION_MASK = PADDING - 1
_HEADER = 512  # bytes of a ustar header; the payload follows it
_TARGET_BLOCK_BYTES = 1 << 20


class CorruptShardError(ShardFormatError):
    """Bytes of a shard are not those that were written.

    Attributes: path; block (None: the whole file); offset in bytes; expected; got.
    """

    def __init__(self, path, block: int | None, offset: int, expected: str, got: str):
        self.path, self.block, self.offset = str(path), block, offset
        self.expected, self.got = expected, got
        where = "file" if block is None else f"block {block}"
        super().__init__(
            f"{path}: {where} at byte {offset} is damaged: expected {expected}, got {got}; restore "
            "the file, or delete it and its .idx.npz and run `xlstm-data build` again"
        )

    def __reduce__(self):
        """Rebuild from the arguments, so that worker processes can raise it."""
        return type(self), (self.path, self.block, self.offset, self.expected, self.got)


def token_dtype(vocab_size: int) -> np.dtype:
    """Little-endian storage type of ids below ``vocab_size``."""
    return np.dtype("<u2") if vocab_size <= 65_535 else np.dtype("<u4")


def default_block_rows(row_tokens: int, dtype: np.dtype) -> int:
    """Rows per block that make a block of about 1 MiB."""
    return max(1, _TARGET_BLOCK_BYTES // (row_tokens * dtype.itemsize))


@dataclass(frozen=True)
class Block:
    """Packed rows: tokens [rows, row_tokens]; offsets [rows + 1] into segments (uint32)."""

    tokens: np.ndarray
    offsets: np.ndarray
    segments: np.ndarray

    def doc_bytes(self) -> bytes:
        """Payload of the ``.doc`` member."""
        both = np.concatenate([self.offsets, self.segments])
        return both.astype("<u4", copy=False).tobytes()


def parse_block(tok: bytes, doc: bytes, row_tokens: int, dtype) -> Block:
    """Turn the payloads of a ``.tok`` and a ``.doc`` member back into a Block.

    Also the decoder for samples of a plain ``webdataset`` pipeline. ``dtype``: the manifest's.
    """
    tokens = np.frombuffer(tok, np.dtype(dtype).newbyteorder("<")).reshape(-1, row_tokens)
    numbers = np.frombuffer(doc, "<u4")
    rows = len(tokens)
    return Block(tokens, numbers[: rows + 1], numbers[rows + 1 :])


def row_masks(
    rows: np.ndarray, segments: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """What the segments of some rows mean to the loss and to the cells.

    Args:
        rows: for each segment, which row (0-based) it belongs to.
        segments: ``position | flags`` of each.
        shape: (number of rows, seq_len).

    Returns:
        loss_mask float32 [rows, seq_len], 0 where the target belongs to another document or is
        padding; boundaries bool [rows, seq_len], True at the first token of a document.
    """
    loss_mask = np.ones(shape, np.float32)
    boundaries = np.zeros(shape, bool)
    position = (segments & POSITION_MASK).astype(np.int64)
    padding = (segments & PADDING) != 0
    starts = ~padding & ((segments & CONTINUATION) == 0)

    inside = starts & (position < shape[1])
    boundaries[rows[inside], position[inside]] = True
    crossed = starts & (position > 0)  # the position before a start would predict across documents
    loss_mask[rows[crossed], position[crossed] - 1] = 0.0
    for row, start in zip(rows[padding], position[padding], strict=True):
        loss_mask[row, max(start - 1, 0) :] = 0.0
    return loss_mask, boundaries


@dataclass(frozen=True)
class BlockIndex:
    """Where the blocks of one shard lie: arrays of one entry per block."""

    off: np.ndarray
    size: np.ndarray
    xxh3: np.ndarray
    doc_off: np.ndarray
    doc_size: np.ndarray
    doc_xxh3: np.ndarray
    rows: np.ndarray

    def to_bytes(self) -> bytes:
        """The ``.idx.npz`` file (the same bytes for the same index)."""
        buffer = io.BytesIO()
        np.savez(buffer, **{field.name: getattr(self, field.name) for field in fields(self)})
        return buffer.getvalue()

    @classmethod
    def load(cls, path: Path, expected_xxh3: str) -> BlockIndex:
        """Read an index file.

        Raises:
            CorruptShardError: its bytes have another hash than the manifest says, or it is missing.
        """
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise CorruptShardError(path, None, 0, "a readable index", str(error)) from None
        got = xxhash.xxh3_64_hexdigest(raw)
        if got != expected_xxh3:
            raise CorruptShardError(path, None, 0, f"xxh3 {expected_xxh3}", f"xxh3 {got}")
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})


class _HashingFile:
    """The part of a file that tarfile writes through, with a running xxh3."""

    def __init__(self, file):
        self.file, self.hash, self.position = file, xxhash.xxh3_64(), 0

    def write(self, data) -> int:
        self.hash.update(data)
        self.position += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.position


class ShardWriter:
    """Writes one tar and its index; nothing appears under the final names before ``close``.

    Use as a context manager: leaving it with an exception removes the unfinished file.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
        self._file = open(self._temporary, "wb")
        self._hashing = _HashingFile(self._file)
        self._tar = tarfile.open(fileobj=self._hashing, mode="w", format=tarfile.USTAR_FORMAT)
        self._entries: list[tuple[int, int, int, int, int, int, int]] = []

    def _add(self, name: str, payload: bytes) -> tuple[int, int, int]:
        info = tarfile.TarInfo(name)  # mtime, uid and gid are 0: nothing depends on the machine
        info.size, info.mode = len(payload), 0o644
        offset = self._hashing.tell() + _HEADER
        self._tar.addfile(info, io.BytesIO(payload))
        return offset, len(payload), xxhash.xxh3_64_intdigest(payload)

    def write(self, block: Block) -> None:
        """Append one block."""
        key = f"b{len(self._entries):06d}"
        tok = self._add(f"{key}.tok", block.tokens.tobytes())
        doc = self._add(f"{key}.doc", block.doc_bytes())
        self._entries.append((*tok, *doc, len(block.tokens)))

    def close(self) -> dict[str, str | int]:
        """Finish both files; the ``ShardEntry`` fields that depend on bytes, without the paths."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        table = np.array(self._entries, np.uint64).reshape(len(self._entries), 7)
        index = BlockIndex(*(np.ascontiguousarray(column) for column in table.T))
        raw = index.to_bytes()
        write_atomic(index_path(self.path), raw)
        os.replace(self._temporary, self.path)
        return {
            "rows": int(index.rows.sum()),
            "bytes": self._hashing.position,
            "xxh3": self._hashing.hash.hexdigest(),
            "index_xxh3": xxhash.xxh3_64_hexdigest(raw),
        }

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)


def index_path(tar: Path) -> Path:
    """``shard-00000042.tar`` -> ``shard-00000042.idx.npz``."""
    return tar.with_suffix("").with_suffix(".idx.npz")


class ShardReader:
    """Random access to the rows of one tar. A block is hashed when it is first touched.

    Raises (from every method):
        CorruptShardError: missing or short file, or bytes whose xxh3 is not the index's.
    """

    def __init__(self, root: Path, entry: ShardEntry, row_tokens: int, dtype):
        self.path = root / entry.path
        self.entry, self.row_tokens = entry, row_tokens
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.index = BlockIndex.load(root / entry.index, entry.index_xxh3)
        self._first_row = np.concatenate([[0], np.cumsum(self.index.rows.astype(np.int64))])
        self._checked = bytearray(len(self.index.rows))
        if int(self._first_row[-1]) != entry.rows:
            got = f"{self._first_row[-1]} rows in its index"
            raise CorruptShardError(self.path, None, 0, f"{entry.rows} rows", got)
        check_size(root, entry)
        self._fd = os.open(self.path, os.O_RDONLY)

    @property
    def num_blocks(self) -> int:
        """Number of blocks in this shard."""
        return len(self.index.rows)

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def block(self, number: int) -> Block:
        """A whole block, hashed and its structure checked."""
        tok = self._verified(number, self.index.off, self.index.size, self.index.xxh3)
        doc = self._verified(number, self.index.doc_off, self.index.doc_size, self.index.doc_xxh3)
        self._checked[number] = 1
        return parse_block(tok, doc, self.row_tokens, self.dtype)

    def row(self, number: int, out: np.ndarray) -> np.ndarray:
        """Read one row's tokens into ``out`` [row_tokens] (of the stored type); its segments."""
        block = int(np.searchsorted(self._first_row, number, side="right")) - 1
        if not self._checked[block]:
            self.block(block)
        local = number - int(self._first_row[block])
        nbytes = self.row_tokens * self.dtype.itemsize
        offset = int(self.index.off[block]) + local * nbytes
        if os.preadv(self._fd, [out], offset) != nbytes:
            self._short(block, offset, nbytes)
        doc_off, rows = int(self.index.doc_off[block]), int(self.index.rows[block])
        first, last = np.frombuffer(self._read(block, doc_off + 4 * local, 8), "<u4").tolist()
        start = doc_off + 4 * (rows + 1 + first)
        return np.frombuffer(self._read(block, start, 4 * (last - first)), "<u4")

    def _read(self, block: int, offset: int, size: int) -> bytes:
        data = os.pread(self._fd, size, offset)
        if len(data) != size:
            self._short(block, offset, size)
        return data

    def _short(self, block: int, offset: int, size: int):
        got = f"the end of the file at {os.fstat(self._fd).st_size}"
        raise CorruptShardError(self.path, block, offset, f"{size} bytes", got)

    def _verified(self, block: int, off, size, xxh3) -> bytes:
        offset = int(off[block])
        data = self._read(block, offset, int(size[block]))
        got, expected = xxhash.xxh3_64_intdigest(data), int(xxh3[block])
        if got != expected:
            raise CorruptShardError(
                self.path, block, offset, f"xxh3 {expected:016x}", f"xxh3 {got:016x}"
            )
        return data


def check_size(root: Path, entry: ShardEntry) -> None:
    """Compare a shard's size on disk with the manifest's; cheap enough for every shard at start.

    Raises:
        CorruptShardError: the file is missing or has another size.
    """
    path = root / entry.path
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CorruptShardError(path, None, 0, f"{entry.bytes} bytes", str(error)) from None
    if size != entry.bytes:
        raise CorruptShardError(
            path, None, min(size, entry.bytes), f"{entry.bytes} bytes", f"{size} bytes"
        )
