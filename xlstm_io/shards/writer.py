"""Writes shards: a tar and its index, the same bytes on every machine. The format: `shard`."""

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import xxhash

from xlstm_io.shards.index import BlockIndex
from xlstm_io.shards.rows import Block
from xlstm_io.shards.shard import index_path, member_name, tar_header
from xlstm_io.storage import sync_folder, temporary_path, write_atomic


class _HashingFile:
    """A file that is written from front to back, with a running xxh3."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash, self.position = file, xxhash.xxh3_64(), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.position += len(data)
        return self.file.write(data)


@dataclass(frozen=True)
class WrittenShard:
    """What `ShardEntry` records about the bytes of a shard.

    Attributes:
        rows: rows in all blocks.
        bytes: size of the tar.
        xxh3: hash of the tar.
        index_xxh3: hash of the index file.
    """

    rows: int
    bytes: int
    xxh3: str
    index_xxh3: str


class ShardWriter:
    """Writes one tar and its index; nothing appears under the final names before `close`.

    Use as a context manager: leaving it with an exception removes the unfinished file.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = temporary_path(path)
        self._file = open(self._temporary, "wb")
        self._hashing = _HashingFile(self._file)
        self._entries: list[tuple[int, ...]] = []

    def _add(self, name: str, payload: bytes) -> tuple[int, int, int]:
        self._hashing.write(tar_header(name, len(payload)))
        offset = self._hashing.position
        self._hashing.write(payload)
        self._hashing.write(bytes(-len(payload) % tarfile.BLOCKSIZE))
        return offset, len(payload), xxhash.xxh3_64_intdigest(payload)

    def write(self, block: Block) -> None:
        """Append one block."""
        number = len(self._entries)
        tok = self._add(member_name(number, "tok"), block.tokens.tobytes())
        doc = self._add(member_name(number, "doc"), block.doc_bytes())
        entry: tuple[int, ...] = (*tok, *doc, len(block.tokens))
        if block.labels is not None:
            entry += self._add(member_name(number, "lab"), block.labels.tobytes())
        self._entries.append(entry)

    def close(self) -> WrittenShard:
        """Finish both files and let them appear under their names."""
        end = 2 * tarfile.BLOCKSIZE  # the end of an archive, then up to a whole record
        self._hashing.write(bytes(end + -(self._hashing.position + end) % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        columns = max(map(len, self._entries), default=7)
        table = np.array(self._entries, np.uint64).reshape(len(self._entries), columns)
        index = BlockIndex(*(np.ascontiguousarray(column) for column in table.T))
        raw = index.to_bytes()
        write_atomic(index_path(self.path), raw)
        os.replace(self._temporary, self.path)
        sync_folder(self.path.parent)  # whoever names the shard next relies on it
        return WrittenShard(
            rows=int(index.rows.sum()),
            bytes=self._hashing.position,
            xxh3=self._hashing.hash.hexdigest(),
            index_xxh3=xxhash.xxh3_64_hexdigest(raw),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
