"""Local copies of remote shards, shared by all processes of a machine.

A shard is downloaded whole when one of its rows is first asked for. It is written under a
temporary name, hashed on the way, and renamed when the hash is the manifest's. Only renamed files
are read, so a broken transfer or a changed object is an error and never data. A lock file for each
shard lets one process download while the others wait. The least recently used shards make room.
One that is being opened is left alone.

The folder of a remote corpus is named by the hash of its manifest, so a corpus that was rebuilt at
the same URL has other copies.
"""

import contextlib
import errno
import fcntl
import os
import posixpath
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from xlstm_io.errors import ShardFormatError
from xlstm_io.foreign.untrusted import LIMITS
from xlstm_io.remote import RemotePath, os_errors
from xlstm_io.shards.index import CorruptShardError
from xlstm_io.shards.manifest import (
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    load_manifest,
    place_of,
)
from xlstm_io.shards.shard import index_path
from xlstm_io.storage import open_file, read_file, replacing, write_atomic

_CHUNK = 1 << 22
_ATTEMPTS = 3
_SPARE_SHARE = 20  # of the cache, that is emptied at once when it is full
_PAUSE_SECONDS = 1.0  # before the second attempt; doubles


@dataclass(frozen=True)
class CacheSettings:
    """Where copies go, and how many bytes of them are kept.

    Attributes:
        folder: a folder on a local disk.
        limit: bytes; the least recently used shards are deleted to keep it.
    """

    folder: Path
    limit: int


class ShardCache:
    """The copies of one remote folder of shards.

    Raises:
        ShardFormatError: no manifest there, or it cannot be read; or the folder of the copies
            cannot be written.
    """

    def __init__(self, url: str, settings: CacheSettings) -> None:
        self.url, self.settings = url.rstrip("/").removesuffix(f"/{MANIFEST_NAME}"), settings
        self._remote = RemotePath(self.url)
        raw = self._download(MANIFEST_NAME, LIMITS.shard_manifest)
        self.root = settings.folder / xxhash.xxh3_128_hexdigest(raw)
        try:
            write_atomic(self.root / MANIFEST_NAME, raw)
        except OSError as error:
            raise ShardFormatError(
                f"data.cache_dir={settings.folder} cannot be written "
                f"({error.strerror or error}); use another folder, or make room there"
            ) from error
        self.manifest: Manifest = load_manifest(self.root)
        self._fetch_tokenizer()

    def check_sizes(self, entries: list[ShardEntry]) -> None:
        """Compare the sizes of remote shards with the manifest's, by one listing if there is any.

        Raises:
            CorruptShardError: a shard is missing or has another size.
            ShardFormatError: the server does not answer.
        """
        try:
            with os_errors(self._remote):
                found = self._remote.fs.find(self._remote.key, detail=True)
                sizes = {name: info["size"] for name, info in found.items()}
            for entry in entries:
                size = sizes.get(f"{self._remote.key}/{entry.path}") or self._size(entry.path)
                if size is not None and size != entry.bytes:
                    got = f"{size} bytes" if size >= 0 else "no such file"
                    raise CorruptShardError(
                        self._name(entry.path), None, 0, f"{entry.bytes} bytes", got
                    )
        except OSError as error:
            raise ShardFormatError(f"{self.url} cannot be read: {error}") from error

    def _size(self, path: str) -> int | None:
        """Bytes of a file that no listing gave; None: the server does not say; -1: no such file."""
        try:
            with os_errors(self._remote):
                return self._remote.fs.info(f"{self._remote.key}/{path}")["size"]
        except FileNotFoundError:
            return -1

    @contextlib.contextmanager
    def holding(self, entry: ShardEntry) -> Iterator[Path]:
        """The root under which the shard's copies are, for as long as it takes to open them.

        Raises:
            CorruptShardError: missing there, or other bytes than were written.
            ShardFormatError: it cannot be read, or is larger than the whole cache.
            OSError: the disk of the cache is full.
        """
        tar = place_of(self.root, entry.path)
        with _lock(self._lock_file(tar)):
            if not tar.exists():
                self._make_room(entry.bytes)
                self._fetch(entry.index, entry.index_xxh3)
                self._fetch(entry.path, entry.xxh3)
            os.utime(tar)  # the least recently opened goes first
            yield self.root

    def drop(self, entry: ShardEntry) -> None:
        """Delete the copies of a shard; the next one who opens it makes them again."""
        tar = place_of(self.root, entry.path)
        with _lock(self._lock_file(tar)):
            _delete(tar)

    def _name(self, path: str) -> str:
        return f"{self.url}/{path}"

    def _lock_file(self, tar: Path) -> Path:
        name = tar.relative_to(self.settings.folder).as_posix().replace("/", "+")
        return self.settings.folder / "locks" / f"{name}.lock"

    def _download(self, path: str, limit: int) -> bytes:
        try:
            return read_file(self._remote / path, limit)
        except FileNotFoundError:
            raise ShardFormatError(
                f"{self._name(path)} does not exist: the build is unfinished or was not copied "
                "whole, this is another folder, or its server does not answer"
            ) from None
        except OSError as error:
            raise ShardFormatError(f"{self._name(path)} cannot be read: {error}") from error

    def _fetch_tokenizer(self) -> None:
        """Beside the copies, because checkpoints point to it; its users compare its hash."""
        tokenizer = self.manifest.tokenizer
        names = [posixpath.basename(tokenizer.path)]
        if tokenizer.type == "huggingface":
            names.append("tokenizer_config.json")
        for path in (posixpath.join(posixpath.dirname(tokenizer.path), name) for name in names):
            target = place_of(self.root, path)
            if not target.exists():
                with contextlib.suppress(ShardFormatError):  # training itself needs none
                    write_atomic(target, self._download(path, LIMITS.tokenizer))

    def _fetch(self, path: str, expected: str) -> None:
        """Download a file under the lock of its shard; see the module."""
        target = place_of(self.root, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f"{target.name}.tmp.*"):
            stale.unlink(missing_ok=True)  # of a process that was killed: we hold the lock
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                with replacing(target) as file:
                    got = self._copy(path, file)
                    if got != expected:
                        times = f"xxh3 {got} ({attempt + 1} times)"
                        raise CorruptShardError(
                            self._name(path), None, 0, f"xxh3 {expected}", times
                        )
                return
            except FileNotFoundError:
                raise CorruptShardError(
                    self._name(path), None, 0, f"xxh3 {expected}", "no such file"
                ) from None
            except CorruptShardError as error:
                problem: ShardFormatError = error
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):  # here, not there
                    raise
                problem = ShardFormatError(f"{self._name(path)} cannot be copied: {error}")
        raise problem

    def _copy(self, path: str, target: BinaryIO) -> str:
        """Stream to a file; the xxh3 of what came."""
        digest = xxhash.xxh3_64()
        with os_errors(self._remote / path), open_file(self._remote / path) as source:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                target.write(chunk)
        return digest.hexdigest()

    def _make_room(self, needed: int) -> None:
        """Count `needed` bytes more, for which the least recently opened shards are deleted.

        The bytes are noted, because looking at all copies takes seconds where there are thousands.
        What the note says can be too much, after a broken transfer, and then is counted anew.
        """
        limit, folder = self.settings.limit, self.settings.folder
        if needed > limit:
            raise ShardFormatError(
                f"data.cache_gb={limit / 1e9:g} is less than one shard of {self.url} "
                f"({needed / 1e9:.3g} GB); make it larger"
            )
        with _lock(folder / "locks" / "all"):
            note = folder / "locks" / "bytes"
            try:
                total = int(note.read_bytes())
            except (OSError, ValueError):
                total = limit  # not known
            if total + needed > limit:
                total = self._delete_until(needed)
            note.write_text(str(total + needed))

    def _delete_until(self, needed: int) -> int:
        """Delete shards of all corpora until `needed` bytes fit, and some more; the bytes left."""
        limit, folder = self.settings.limit, self.settings.folder
        found = []
        for path in folder.rglob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # a damaged one that is just being dropped
                found.append((path.stat(), path))
        total = sum(status.st_size for status, _ in found)
        if total + needed <= limit:
            return total
        room = needed + limit // _SPARE_SHARE // needed * needed  # so that the next ones fit, too
        for status, path in sorted(found, key=lambda item: item[0].st_mtime_ns):
            if total + room <= limit:
                break
            with contextlib.suppress(BlockingIOError), _lock(self._lock_file(path), wait=False):
                _delete(path)
                total -= status.st_size
        return total


def _delete(tar: Path) -> None:
    """Delete a tar and, after it, its index: where there is a tar, there is one."""
    tar.unlink(missing_ok=True)
    index_path(tar).unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """An exclusive lock between processes and threads; ends with the process.

    Raises:
        BlockingIOError: somebody has it, and `wait` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
