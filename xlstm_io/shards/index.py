"""The index of a shard: where its blocks lie, with their hashes; and the error of damaged bytes."""

import errno
import io
import tarfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash

from xlstm_io.errors import ShardFormatError
from xlstm_io.foreign.arrays import parse_npz
from xlstm_io.foreign.untrusted import LIMITS
from xlstm_io.storage import read_file

_LABEL_COLUMNS = 3  # the last ones of an index

MISSING = "the file is missing"
"""What is said to be there, in place of a file that is gone."""


class CorruptShardError(ShardFormatError):
    """Bytes of a shard are not those that were written.

    Attributes:
        path: the file.
        block: number of the block; None: the whole file.
        offset: where, in bytes.
        expected: what the index or manifest says.
        got: what is there.
    """

    def __init__(self, path: str | Path, block: int | None, offset: int, expected: str, got: str):
        self.path, self.block, self.offset = str(path), block, offset
        self.expected, self.got = expected, got
        where = "file" if block is None else f"block {block}"
        found = f"{where} at byte {offset} is damaged: expected {expected}, got {got}"
        rest = "delete it and its .idx.npz and "
        if got == MISSING:
            found, rest = MISSING, ""
        super().__init__(
            f"{path}: {found}; restore the file, or {rest}run `python -m data_prep build` again"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from the arguments, so that worker processes can raise it."""
        return type(self), (self.path, self.block, self.offset, self.expected, self.got)


def cause_of(error: OSError) -> str:
    """What is in the place of a file that cannot be read.

    Raises:
        ShardFormatError: this process has too many files open, and nothing is known of this one.
    """
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise ShardFormatError(
            f"{error.filename} cannot be opened, because this process has too many files open; "
            "raise the limit (`ulimit -n`), or mix fewer sources"
        )
    return MISSING if isinstance(error, FileNotFoundError) else error.strerror or str(error)


@dataclass(frozen=True)
class BlockIndex:
    """Where the blocks of one shard lie: arrays of one entry per block.

    Attributes:
        off: offset of the `.tok` payload in the tar.
        size: its bytes.
        xxh3: its hash.
        doc_off: offset of the `.doc` payload.
        doc_size: its bytes.
        doc_xxh3: its hash.
        rows: rows of the block.
        lab_off: offset of the `.lab` payload; this and the next two are None without labels.
        lab_size: its bytes.
        lab_xxh3: its hash.
    """

    off: np.ndarray
    size: np.ndarray
    xxh3: np.ndarray
    doc_off: np.ndarray
    doc_size: np.ndarray
    doc_xxh3: np.ndarray
    rows: np.ndarray
    lab_off: np.ndarray | None = None
    lab_size: np.ndarray | None = None
    lab_xxh3: np.ndarray | None = None

    def columns(self) -> dict[str, Any]:
        """The arrays that there are, by name."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: column for name, column in columns.items() if column is not None}

    def to_bytes(self) -> bytes:
        """The `.idx.npz` file (the same bytes for the same index)."""
        buffer = io.BytesIO()
        np.savez(buffer, **self.columns())
        return buffer.getvalue()

    @classmethod
    def load(cls, path: Path, expected_xxh3: str, *, labels: bool = False) -> Self:
        """Read an index file.

        Args:
            path: the file.
            expected_xxh3: its hash.
            labels: whether the shard has labels.

        Raises:
            CorruptShardError: its bytes have another hash than the manifest says, it is missing, or
                it is not an index.
        """
        try:
            raw = read_file(path, LIMITS.shard_index, links=True)
        except OSError as error:
            raise CorruptShardError(path, None, 0, "a readable index", cause_of(error)) from None
        got = xxhash.xxh3_64_hexdigest(raw)
        if got != expected_xxh3:
            raise CorruptShardError(path, None, 0, f"xxh3 {expected_xxh3}", f"xxh3 {got}")
        try:
            names = [field.name for field in fields(cls)][: None if labels else -_LABEL_COLUMNS]
            return cls(**parse_npz(raw, dict.fromkeys(names, "<u8")))
        except ValueError as error:
            raise CorruptShardError(path, None, 0, "a readable index", str(error)) from None

    def problem(self, size: int, row_bytes: int, label_bytes: int) -> str:
        """What is wrong with the numbers; empty if every block lies in the tar behind the last.

        Args:
            size: bytes of the tar.
            row_bytes: bytes of a row's tokens.
            label_bytes: bytes of a row's labels.
        """
        columns = self.columns()
        if len({len(column) for column in columns.values()}) > 1:
            return "arrays of different lengths"
        if not len(self.rows):
            return "no blocks"
        largest = max(size, LIMITS.shard_block)
        measures = [column for name, column in columns.items() if not name.endswith("xxh3")]
        if any((column > largest).any() for column in measures):
            return f"numbers beyond the tar's {size} bytes"
        off, tok, doc_off, doc, rows, *labels = (column.astype(np.int64) for column in measures)
        if max(tok.max(), doc.max()) > LIMITS.shard_block:
            return f"a member of more than {LIMITS.shard_block} bytes, which are not read"
        if (rows < 1).any() or (rows * row_bytes != tok).any():
            return "sizes that do not fit the rows"
        members = [(off, tok), (doc_off, doc)]
        if labels:
            members.append((labels[0], labels[1]))
            if (rows * label_bytes != labels[1]).any():
                return "sizes of labels that do not fit the rows"
        begins = np.column_stack([begin for begin, _ in members]).reshape(-1) - tarfile.BLOCKSIZE
        ends = np.column_stack([_padded(begin + bytes_) for begin, bytes_ in members]).reshape(-1)
        if (begins[1:] != ends[:-1]).any() or begins[0] != 0 or ends[-1] > size:
            return "members that do not lie one behind the other in the tar"
        if (doc % 4).any() or (doc < 4 * (rows + 1)).any():
            return "sizes that do not fit the segments"
        return ""


def _padded(end: np.ndarray) -> np.ndarray:
    """Where the next header begins, behind a payload that ends at `end`."""
    return end + -end % tarfile.BLOCKSIZE
