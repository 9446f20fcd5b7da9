"""The shard format: tars of blocks of packed rows, with index and checksums.

Only this module and its neighbours read or write the format.

Layout of a folder (every path in `manifest.json` is relative to it)::

    <source>/<split>/shard-00000042.tar       ustar, mtime 0: the same bytes on every build
        b000000.tok   little-endian uint16|uint32 [rows, seq_len + 1]
        b000000.doc   little-endian uint32: rows + 1 offsets, then the segments of each row;
                      best_fit: then the document of each segment, numbered within the shard
        b000000.lab   only where the manifest says `labels`: little-endian, of the tokens' type,
                      [rows, seq_len]: the label of each input, or the largest number for none
    <source>/<split>/shard-00000042.idx.npz   offsets, sizes and xxh3 of every block
    tokenizer/tokenizer.model                 the tokenizer travels with its ids
    manifest.json                             written last

A tar member is a block of rows (about 1 MiB), not one sequence: a header per 4 KB costs 25 %.
Plain `webdataset` reads the tars as samples `{"tok": bytes, "doc": bytes}`; this module also
finds single rows by offset. Its readers never trust tarfile's end of file, which takes a damaged
header for the end of the archive: they read what the index lists and compare xxh3.

A *segment* of a row is `position | flags`: where a document (or padding) starts in the row.
Position 0 always has one; CONTINUATION says that the document began in an earlier row, PADDING
that the rest of the row is padding. In `concat` rows a continuation stands at position 0 and goes
on from the row before. In `best_fit` rows it may stand anywhere: a part of a cut document begins
with the last token of the part before, so that no target is lost.

Labels are for what a mask over next tokens cannot say: a task whose answers do not stand in the
input, or a text of which only some parts are to be learnt.
"""

import bisect
import os
import stat
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from xlstm_io.shards.index import BlockIndex, CorruptShardError, cause_of
from xlstm_io.shards.manifest import Manifest, ShardEntry, place_of
from xlstm_io.shards.rows import Block, block_problem, parse_block
from xlstm_io.storage import file_size, open_plain

_TARGET_BLOCK_BYTES = 1 << 20
_ATTEMPTS = 3  # at a row of a file that changes while it is read


def default_block_rows(row_tokens: int, dtype: np.dtype) -> int:
    """Rows per block that make a block of about 1 MiB."""
    return max(1, _TARGET_BLOCK_BYTES // (row_tokens * dtype.itemsize))


def tar_header(name: str, size: int) -> bytes:
    """The bytes before a payload; mtime, uid and gid are 0: nothing depends on the machine."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def member_name(block: int, suffix: str) -> str:
    """`b000042.tok`."""
    return f"b{block:06d}.{suffix}"


def index_path(tar: Path) -> Path:
    """`shard-00000042.tar` -> `shard-00000042.idx.npz`."""
    return tar.with_suffix("").with_suffix(".idx.npz")


class CheckedBlocks:
    """Which blocks of a shard were compared with their hashes, while the file was as it is now.

    Args:
        blocks: number of blocks.

    Attributes:
        left: for each block how many more rows it gives before it is checked again.
    """

    def __init__(self, blocks: int) -> None:
        self.left = [0] * blocks
        self._file: tuple[int, ...] = ()

    def follow(self, descriptor: int) -> bool:
        """Forget what was checked if the file has changed since; whether it has.

        A change shows by size, by the times of the last change, or by another file under its name.
        """
        about = os.fstat(descriptor)
        now = (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino, about.st_dev)
        if now == self._file:
            return False
        self._file = now
        self.left = [0] * len(self.left)
        return True


class ShardReader:
    """Random access to the rows of one tar. A block is checked before one of its rows is given.

    Checked are the hashes of the payloads and every other byte (headers, padding and, with the
    last block, the end of the archive), and that the numbers in them can be used: ids of the
    vocabulary, segments inside their rows. A block is checked again when the file has changed, and
    when it has given as many rows as it has: a disk may change bytes without a new time.

    Args:
        manifest: of the shard's folder.
        entry: the shard.
        checked: what an earlier reader of this shard has checked; a dataset keeps it while it
            closes and opens the shard.

    Raises (from every method):
        CorruptShardError: missing, unreadable or short file, or other bytes than were written.
    """

    def __init__(self, manifest: Manifest, entry: ShardEntry, checked: CheckedBlocks | None = None):
        root = manifest.root
        self.path = place_of(root, entry.path)
        self.entry, self.row_tokens = entry, manifest.row_tokens
        self._vocab_size, self._best_fit = manifest.vocab_size, manifest.packing == "best_fit"
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._row_bytes = self.row_tokens * self.dtype.itemsize
        index_file = place_of(root, entry.index)
        self.index = BlockIndex.load(index_file, entry.index_xxh3, labels=manifest.labels)
        label_bytes = self._row_bytes - self.dtype.itemsize
        problem = self.index.problem(entry.bytes, self._row_bytes, label_bytes)
        if problem:
            raise CorruptShardError(index_file, None, 0, "an index of the tar", problem)
        self._first_row = [0, *np.cumsum(self.index.rows.astype(np.int64)).tolist()]
        self._offsets = self.index.off.tolist()
        self._docs: dict[int, np.ndarray] = {}  # about 4 bytes for each row and document
        self.checked = CheckedBlocks(self.num_blocks) if checked is None else checked
        if self._first_row[-1] != entry.rows:
            got = f"{self._first_row[-1]} rows in its index"
            raise CorruptShardError(self.path, None, 0, f"{entry.rows} rows", got)
        check_size(root, entry)
        try:
            self._fd = open_plain(self.path)
        except OSError as error:
            raise CorruptShardError(
                self.path, None, 0, "a readable file", cause_of(error)
            ) from None

    @property
    def num_blocks(self) -> int:
        """Number of blocks in this shard."""
        return len(self.index.rows)

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def block_of(self, row: int) -> int:
        """Number of the block that holds a row."""
        return bisect.bisect_right(self._first_row, row) - 1

    def block(self, number: int) -> Block:
        """A whole block, every byte of it checked."""
        index = self.index
        tok = self._verified(number, "tok", index.off, index.size, index.xxh3)
        doc = self._verified(number, "doc", index.doc_off, index.doc_size, index.doc_xxh3)
        lab, end = None, int(index.doc_off[number]) + len(doc)
        if index.lab_off is not None and index.lab_size is not None and index.lab_xxh3 is not None:
            lab = self._verified(number, "lab", index.lab_off, index.lab_size, index.lab_xxh3)
            end = int(index.lab_off[number]) + len(lab)
        if number == self.num_blocks - 1:
            rest = self._read(number, end, self.entry.bytes - end)
            if rest.count(0) != len(rest):
                raise CorruptShardError(self.path, number, end, "zeros to the end", "other bytes")
        try:
            block = parse_block(tok, doc, self.row_tokens, self.dtype, lab)
            problem = block_problem(block, self._vocab_size, best_fit=self._best_fit)
        except ValueError as error:
            problem = str(error)
        if problem:
            at = self._offsets[number]
            raise CorruptShardError(self.path, number, at, "rows of tokens", problem)
        return block

    def row(self, number: int, out: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
        """Read one row's tokens and, where asked for, its labels; its segments.

        Args:
            number: of the row in this shard.
            out: `[row_tokens]`, of the stored type.
            labels: `[row_tokens - 1]`, of the stored type; the shard must have labels.
        """
        block = self.block_of(number)
        local = number - self._first_row[block]
        offset = self._offsets[block] + local * self._row_bytes
        for _ in range(_ATTEMPTS):
            if self.checked.follow(self._fd):
                self._docs.clear()
            if not self.checked.left[block]:
                self._check(block)
            self._read_into(out, block, offset)
            if labels is not None:
                assert self.index.lab_off is not None, "the manifest says whether there are labels"
                first = int(self.index.lab_off[block])
                self._read_into(labels, block, first + local * labels.nbytes)
            doc = self._doc(block)
            if not self.checked.follow(self._fd):
                self.checked.left[block] -= 1
                start = self._first_row[block + 1] - self._first_row[block] + 1
                return doc[start + int(doc[local]) : start + int(doc[local + 1])]
        raise CorruptShardError(self.path, block, offset, "a finished file", "one being written")

    def _doc(self, block: int) -> np.ndarray:
        """The numbers of a checked block's `.doc` member."""
        doc = self._docs.get(block)
        if doc is None:
            index = self.index
            raw = self._verified(block, "doc", index.doc_off, index.doc_size, index.doc_xxh3)
            doc = self._docs[block] = np.frombuffer(raw, "<u4")
        return doc

    def _check(self, number: int) -> None:
        """Check a block, and count from anew the rows that it gives."""
        self._docs.pop(number, None)
        self.block(number)
        self.checked.left[number] = int(self.index.rows[number])

    def _read_into(self, out: np.ndarray, block: int, offset: int) -> None:
        try:
            size = os.preadv(self._fd, [out.data], offset)
        except OSError as error:
            raise self._unreadable(block, offset, out.nbytes, error) from None
        if size != out.nbytes:
            raise self._short(block, offset, out.nbytes)

    def _read(self, block: int, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._fd, size, offset)
        except OSError as error:
            raise self._unreadable(block, offset, size, error) from None
        if len(data) != size:
            raise self._short(block, offset, size)
        return data

    def _unreadable(self, block: int, offset: int, size: int, error: OSError) -> CorruptShardError:
        return CorruptShardError(self.path, block, offset, f"{size} bytes", cause_of(error))

    def _short(self, block: int, offset: int, size: int) -> CorruptShardError:
        got = f"the end of the file at {os.fstat(self._fd).st_size}"
        return CorruptShardError(self.path, block, offset, f"{size} bytes", got)

    def _verified(
        self, block: int, suffix: str, offsets: np.ndarray, sizes: np.ndarray, hashes: np.ndarray
    ) -> bytes:
        """A member's payload; its header, hash and padding are those that were written."""
        offset, size = int(offsets[block]), int(sizes[block])
        header = tar_header(member_name(block, suffix), size)
        padded = size + -size % tarfile.BLOCKSIZE
        data = self._read(block, offset - len(header), len(header) + padded)
        payload = memoryview(data)[len(header) : len(header) + size]
        got, expected = xxhash.xxh3_64_intdigest(payload), int(hashes[block])
        if got != expected:
            raise CorruptShardError(
                self.path, block, offset, f"xxh3 {expected:016x}", f"xxh3 {got:016x}"
            )
        if not data.startswith(header):
            at = offset - len(header)
            raise CorruptShardError(self.path, block, at, "the header of its member", "other bytes")
        if any(data[len(header) + size :]):
            at = offset + size
            raise CorruptShardError(self.path, block, at, "zeros up to the next header", "others")
        return bytes(payload)


def entry_is_there(root: Path, entry: ShardEntry) -> bool:
    """Whether a shard's files are in `root`, the tar with its size.

    Raises:
        ShardFormatError: a link leads from one of them out of the folder.
    """
    try:
        check_size(root, entry)
    except CorruptShardError:
        return False
    return place_of(root, entry.index).is_file()


def check_sizes(root: Path, entries: Sequence[ShardEntry]) -> None:
    """As `check_size` for each shard, and faster: a run compares all of them at its start.

    Each folder is looked at once for links that lead out of `root`, and its files are found from
    there. Whatever is not a plain file of the right size is left to `check_size`.

    Raises:
        CorruptShardError: a file is missing or has another size.
        ShardFormatError: a link leads out of `root`.
    """
    by_folder: dict[str, list[tuple[str, ShardEntry]]] = {}
    for entry in entries:
        folder, _, name = entry.path.rpartition("/")
        by_folder.setdefault(folder, []).append((name, entry))
    for folder, files in by_folder.items():
        try:
            opened = os.open(place_of(root, folder) if folder else root, os.O_DIRECTORY)
        except OSError:
            opened = None
        try:
            for name, entry in files:
                if opened is None or _plain_size(name, opened) != entry.bytes:
                    check_size(root, entry)
        finally:
            if opened is not None:
                os.close(opened)


def _plain_size(name: str, folder: int) -> int | None:
    """Bytes of a plain file in an open folder; None where there is none."""
    try:
        about = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return None
    return about.st_size if stat.S_ISREG(about.st_mode) else None


def check_size(root: Path, entry: ShardEntry) -> None:
    """Compare a shard's size on disk with the manifest's.

    Raises:
        CorruptShardError: the file is missing or has another size.
    """
    path = place_of(root, entry.path)
    try:
        size = file_size(path, links=True)
    except OSError as error:
        raise CorruptShardError(path, None, 0, f"{entry.bytes} bytes", cause_of(error)) from None
    if size != entry.bytes:
        raise CorruptShardError(
            path, None, min(size, entry.bytes), f"{entry.bytes} bytes", f"{size} bytes"
        )
