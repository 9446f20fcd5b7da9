"""Where checkpoints lie: a local folder, or anything that fsspec reaches by URL.

    folder = location("s3://bucket/run/checkpoints")   # RemotePath; location("/runs/a") is a Path
    put(folder / "manifest.json", data)

The functions here are all that saving and loading ask of a file system, and they ask for little: a
whole file can be written and then read, a range of it can be read, a folder can be listed, a file
can be deleted. No rename, no append, no locks, because object stores have none of them. On a local
file system what was written is also on the disk (fsync) when a call returns.

Every failure is an OSError, whatever the backend raised, so that one `except` is enough.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec


class RemotePath:
    """A folder or file at an fsspec URL, with the few parts of `pathlib.Path` that we use."""

    def __init__(self, url: str, fs: Any = None):
        self._url = url.rstrip("/")
        self._fs = fs

    @property
    def fs(self) -> Any:
        """The fsspec file system; OSError if its package is missing or it refuses the URL."""
        if self._fs is None:
            with _as_os_error(self):
                self._fs = fsspec.core.url_to_fs(self._url)[0]
        return self._fs

    @property
    def key(self) -> str:
        """The path as the file system itself names it."""
        return self.fs._strip_protocol(self._url)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self._url.partition("://")[2]).name

    @property
    def parent(self) -> RemotePath:
        """The folder that holds it."""
        return RemotePath(self._url.rpartition("/")[0], self._fs)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self._url}/{name}", self._fs)

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"RemotePath({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and other._url == self._url

    def __lt__(self, other: RemotePath) -> bool:
        return self._url < other._url

    def __hash__(self) -> int:
        return hash(self._url)

    def __reduce__(self):
        return RemotePath, (self._url,)


Location = Path | RemotePath


def location(path: Location | str) -> Location:
    """The place that a path or URL means; `file://` and plain paths are local."""
    if isinstance(path, RemotePath):
        return path
    text = os.fspath(path)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return RemotePath(text) if "://" in text else Path(text)


@contextmanager
def _as_os_error(path: Location) -> Iterator[None]:
    """Backends raise their own exceptions (of boto, of http clients); callers expect OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{path}: {type(error).__name__}: {error}") from error


def is_folder(path: Location) -> bool:
    """Whether there is a folder (on an object store: anything below that prefix)."""
    if isinstance(path, Path):
        return path.is_dir()
    with _as_os_error(path):
        path.fs.invalidate_cache()
        return path.fs.isdir(path.key)


def exists(path: Location) -> bool:
    """Whether there is a file or folder."""
    if isinstance(path, Path):
        return path.exists()
    with _as_os_error(path):
        path.fs.invalidate_cache()
        return path.fs.exists(path.key)


def subfolders(path: Location) -> list[Location]:
    """The folders in a folder, in no order; none if it does not exist."""
    if isinstance(path, Path):
        return [entry for entry in path.iterdir() if entry.is_dir()] if path.is_dir() else []
    return [path / name for name, entry in _listing(path).items() if entry["type"] == "directory"]


def files(path: Location) -> dict[str, tuple[int, float]]:
    """{name: (size in bytes, time of the last change in seconds)} of the files in a folder."""
    if isinstance(path, Path):
        found = {}
        for entry in os.scandir(path):
            about = entry.stat(follow_symlinks=False)
            if not stat.S_ISDIR(about.st_mode):
                found[entry.name] = (about.st_size, about.st_mtime)
        return found
    found = {}
    for name, entry in _listing(path).items():
        if entry["type"] != "directory":
            with _as_os_error(path):
                changed = path.fs.modified(entry["name"]).timestamp()
            found[name] = (entry["size"], changed)
    return found


def _listing(path: RemotePath) -> dict[str, dict[str, Any]]:
    with _as_os_error(path):
        path.fs.invalidate_cache()
        try:
            entries = path.fs.ls(path.key, detail=True)
        except FileNotFoundError:
            return {}
        # Some stores list the folder itself, as an empty object.
        return {
            PurePosixPath(entry["name"]).name: entry
            for entry in entries
            if entry["name"].rstrip("/") != path.key
        }


def file_size(path: Location) -> int:
    """Bytes of a plain file. OSError if there is none, or if it is a link or a device.

    A link in a stranger's checkpoint could lead anywhere, and a pipe would never end.
    """
    if isinstance(path, Path):
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode):
            raise OSError(f"{path} is no plain file but a link, folder or device")
        return about.st_size
    with _as_os_error(path):
        path.fs.invalidate_cache()
        return int(path.fs.size(path.key))


def read_file(path: Location, limit: int) -> bytes:
    """A whole small file; OSError if it is no plain file or has more than `limit` bytes."""
    size = file_size(path)
    if size > limit:
        raise OSError(f"{path} has {size} bytes; more than {limit} are not read")
    if isinstance(path, Path):
        return path.read_bytes()
    with _as_os_error(path):
        return path.fs.cat_file(path.key)


class RangeReader:
    """Reads ranges of files into memory of the caller's; keeps local files open in between."""

    def __init__(self) -> None:
        self._open: dict[Location, int] = {}

    def read_into(self, path: Location, begin: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a file from `begin` on; OSError if it has too few."""
        if isinstance(path, Path):
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            done = 0
            while done < len(buffer):
                count = os.preadv(self._open[path], [buffer[done:]], begin + done)
                if count == 0:
                    break
                done += count
        else:
            with _as_os_error(path):
                data = path.fs.cat_file(path.key, start=begin, end=begin + len(buffer))
            done = len(data)
            if done == len(buffer):
                buffer[:] = data
        if done != len(buffer):
            raise OSError(f"{path} ends at byte {begin + done}, {len(buffer) - done} too early")

    def close(self) -> None:
        """Close what is open."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


@contextmanager
def writing(path: Location) -> Iterator[BinaryIO]:
    """A new file to write to; complete, and on a local disk durable, when the block has ended.

    When the block is left by an exception, a cut file may remain.
    """
    if isinstance(path, Path):
        with path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    else:
        with _as_os_error(path), path.fs.open(path.key, "wb") as file:
            yield file


def put(path: Location, data: bytes) -> None:
    """Write a small file that is either absent or whole.

    Locally by a temporary file and a rename; an object store shows an object when it is complete.
    """
    if isinstance(path, Path):
        temporary = path.with_suffix(".tmp")
        with writing(temporary) as file:
            file.write(data)
        temporary.rename(path)
        sync_folder(path.parent)
    else:
        with _as_os_error(path):
            path.fs.pipe_file(path.key, data)


def make_folder(path: Location) -> None:
    """Create a new folder and its parents; FileExistsError if it exists (not on object stores)."""
    if isinstance(path, Path):
        path.mkdir(parents=True)
    else:
        with _as_os_error(path):
            path.fs.makedirs(path.key, exist_ok=True)


def sync_folder(path: Location) -> None:
    """Make the entries of a local folder durable."""
    if isinstance(path, Path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_file(path: Location) -> None:
    """Delete a file."""
    if isinstance(path, Path):
        path.unlink()
    else:
        with _as_os_error(path):
            path.fs.rm_file(path.key)


def remove_folder(path: Location) -> None:
    """Delete a folder and all that is in it."""
    if isinstance(path, Path):
        shutil.rmtree(path)
    else:
        with _as_os_error(path):
            path.fs.rm(path.key, recursive=True)
            path.fs.invalidate_cache()


def temporary_path(path: Path) -> Path:
    """A name beside ``path`` for a file in the making, which no other process uses.

    It carries host and process: jobs on several nodes may write into one folder.
    """
    return path.with_name(f"{path.name}.tmp.{socket.gethostname()}.{os.getpid()}")


def remove_temporaries(folder: Path, below: str = "**/*") -> None:
    """Remove what killed processes left in ``folder``, when no other process writes there."""
    for path in list(folder.glob(f"{below}.tmp.*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write ``data`` so that ``path`` is either absent, the old file, or complete.

    A temporary file beside it is synced and renamed. Without ``sync`` a loss of power may leave
    other bytes: for files whose readers check them, as waiting for the disk takes milliseconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    with open(temporary, "wb") as file:
        file.write(data)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)
