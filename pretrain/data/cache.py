"""Local copies of remote shards, shared by all processes of a machine.

A shard is downloaded whole when one of its rows is first asked for: to a temporary name, hashed on
the way, renamed when the hash is the manifest's. Nothing else is ever read, so a broken transfer or
a changed object is an error and no data. A lock file per shard lets one process download while the
others wait; the least recently used shards make room, and one that is being opened is left alone.

The folder of a remote corpus is named by the hash of its manifest: a rebuilt corpus at the same URL
never meets the old one's copies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import posixpath
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import xxhash

from xlstm_io.errors import ShardFormatError
from xlstm_io.shards.manifest import MANIFEST_NAME, Manifest, ShardEntry, load_manifest
from xlstm_io.shards.shard import CorruptShardError
from xlstm_io.storage import write_atomic

_CHUNK = 1 << 22
_ATTEMPTS = 3
_PAUSE_SECONDS = 1.0  # before the second attempt; doubles


@dataclass(frozen=True)
class CacheSettings:
    """Where copies go, and how many bytes of them are kept."""

    folder: Path
    limit: int


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path of shards is a URL that fsspec opens."""
    return "://" in str(path)


class ShardCache:
    """The copies of one remote folder of shards.

    Raises:
        ShardFormatError: no manifest there, or it cannot be read.
    """

    def __init__(self, url: str, settings: CacheSettings):
        self.url, self.settings = url.rstrip("/").removesuffix(f"/{MANIFEST_NAME}"), settings
        self._fs, self._pid = None, -1
        raw = self._download(MANIFEST_NAME)
        self.root = settings.folder / xxhash.xxh3_128_hexdigest(raw)
        write_atomic(self.root / MANIFEST_NAME, raw)
        self.manifest: Manifest = load_manifest(self.root)
        self._fetch_tokenizer()

    def check_sizes(self, entries: list[ShardEntry]) -> None:
        """Compare the sizes of remote shards with the manifest's, by one listing if there is any.

        Raises:
            CorruptShardError: a shard is missing or has another size.
            ShardFormatError: the server does not answer.
        """
        fs, base = self._filesystem()
        try:
            sizes = {name: info["size"] for name, info in fs.find(base, detail=True).items()}
            for entry in entries:
                name = f"{base}/{entry.path}"
                size = sizes.get(name) or self._size(name)
                if size is not None and size != entry.bytes:
                    got = f"{size} bytes" if size >= 0 else "no such file"
                    raise CorruptShardError(
                        self._name(entry.path), None, 0, f"{entry.bytes} bytes", got
                    )
        except ShardFormatError:
            raise
        except Exception as error:  # of any kind: each protocol has its own
            raise ShardFormatError(f"{self.url} cannot be read: {error}") from error

    def _size(self, name: str) -> int | None:
        """Bytes of a file that no listing gave; None: the server does not say; -1: no such file."""
        fs, _ = self._filesystem()
        try:
            return fs.info(name)["size"]
        except FileNotFoundError:
            return -1

    @contextlib.contextmanager
    def holding(self, entry: ShardEntry) -> Iterator[Path]:
        """The root under which the shard's copies are, for as long as it takes to open them.

        Raises:
            CorruptShardError: missing there, or other bytes than were written.
            ShardFormatError: it cannot be read, or is larger than the whole cache.
        """
        tar = self.root / entry.path
        with _lock(self._lock_file(tar)):
            if not tar.exists():
                self._make_room(entry.bytes)
                self._fetch(entry.index, entry.index_xxh3)
                self._fetch(entry.path, entry.xxh3)
            os.utime(tar)  # the least recently opened goes first
            yield self.root

    def _name(self, path: str) -> str:
        return f"{self.url}/{path}"

    def _lock_file(self, tar: Path) -> Path:
        name = tar.relative_to(self.settings.folder).as_posix().replace("/", "+")
        return self.settings.folder / "locks" / f"{name}.lock"

    def _filesystem(self):
        """fsspec's file system and this folder's path in it; anew in a forked process."""
        if self._pid != os.getpid():
            self._fs, self._base = fsspec.core.url_to_fs(self.url, skip_instance_cache=True)
            self._pid = os.getpid()
        return self._fs, self._base.rstrip("/")

    def _open(self, path: str):
        fs, base = self._filesystem()
        return fs.open(f"{base}/{path}", "rb")

    def _download(self, path: str) -> bytes:
        try:
            with self._open(path) as file:
                return file.read()
        except FileNotFoundError:
            raise ShardFormatError(
                f"{self._name(path)} does not exist: the build is unfinished or was not copied "
                "whole, this is another folder, or its server does not answer"
            ) from None
        except Exception as error:  # of any kind: each protocol has its own
            raise ShardFormatError(f"{self._name(path)} cannot be read: {error}") from error

    def _fetch_tokenizer(self) -> None:
        """Beside the copies, because checkpoints point to it; its users compare its hash."""
        tokenizer = self.manifest.tokenizer
        names = [posixpath.basename(tokenizer.path)]
        if tokenizer.type == "huggingface":
            names.append("tokenizer_config.json")
        for path in (f"{posixpath.dirname(tokenizer.path)}/{name}" for name in names):
            if not (self.root / path).exists():
                with contextlib.suppress(ShardFormatError):  # training itself needs none
                    write_atomic(self.root / path, self._download(path))

    def _fetch(self, path: str, expected: str) -> None:
        """Download a file under the lock of its shard; see the module."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f"{target.name}.tmp.*"):
            stale.unlink(missing_ok=True)  # of a process that was killed: we hold the lock
        temporary = target.with_name(f"{target.name}.tmp.{os.getpid()}")
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                got = self._copy(path, temporary)
            except FileNotFoundError:
                raise CorruptShardError(
                    self._name(path), None, 0, f"xxh3 {expected}", "no such file"
                ) from None
            except Exception as error:  # of any kind: each protocol has its own
                problem = ShardFormatError(f"{self._name(path)} cannot be copied: {error}")
                continue
            if got == expected:
                os.replace(temporary, target)
                return
            temporary.unlink()
            problem = CorruptShardError(
                self._name(path), None, 0, f"xxh3 {expected}", f"xxh3 {got} ({attempt + 1} times)"
            )
        temporary.unlink(missing_ok=True)
        raise problem

    def _copy(self, path: str, target: Path) -> str:
        """Stream to a file; the xxh3 of what came."""
        digest = xxhash.xxh3_64()
        with self._open(path) as source, open(target, "wb") as file:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def _make_room(self, needed: int) -> None:
        """Delete the least recently opened shards of all corpora until ``needed`` bytes fit."""
        limit, folder = self.settings.limit, self.settings.folder
        if needed > limit:
            raise ShardFormatError(
                f"data.cache_gb={limit / 1e9:g} is less than one shard of {self.url} "
                f"({needed / 1e9:.3g} GB); make it larger"
            )
        with _lock(folder / "locks" / "all"):
            found = [(p.stat(), p) for p in folder.rglob("*.tar")]
            total = sum(status.st_size for status, _ in found)
            for status, path in sorted(found, key=lambda item: item[0].st_mtime_ns):
                if total + needed <= limit:
                    break
                with contextlib.suppress(BlockingIOError), _lock(self._lock_file(path), wait=False):
                    path.unlink(missing_ok=True)
                    path.with_suffix(".idx.npz").unlink(missing_ok=True)
                    total -= status.st_size


@contextlib.contextmanager
def _lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """An exclusive lock between processes and threads; ends with the process.

    Raises:
        BlockingIOError: somebody has it, and ``wait`` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
