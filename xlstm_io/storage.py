"""Files of a local folder, or of anything that fsspec reaches by URL.

    folder = location("s3://bucket/run/checkpoints")   # RemotePath; location("/runs/a") is a Path
    write_atomic(folder / "manifest.json", data)

The functions for both kinds of place ask little of a file system: a whole file can be written and
then read, a range of it can be read, a folder can be listed, a file can be deleted. No rename, no
append, no locks, because object stores have none of them. On a local file system what was written
is also on the disk (fsync) when a call returns.

Every failure is an OSError, whatever the backend raised, so that one `except` is enough. What a
file that somebody else wrote may say (names, sizes) is checked by `xlstm_io.foreign.untrusted`.
"""

import os
import shutil
import socket
import stat
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from xlstm_io.remote import RemotePath, is_remote, os_errors

Location = Path | RemotePath


def location(path: Location | str) -> Location:
    """The place that a path or URL means; `file://` and plain paths are local."""
    if isinstance(path, RemotePath):
        return path
    text = os.fspath(path).removeprefix("file://")
    return RemotePath(text) if is_remote(text) else Path(text)


def absolute(path: str | os.PathLike) -> Path:
    """A local path from the root of the file system on, without links and `..`.

    A loop of links is left as it is, and whoever opens the path says so in words. `Path.resolve`
    raises RuntimeError for one before Python 3.13.
    """
    return Path(os.path.realpath(path))


def is_folder(path: Location) -> bool:
    """Whether there is a folder (on an object store: anything below that prefix)."""
    if isinstance(path, Path):
        return path.is_dir()
    with os_errors(path):
        path.fs.invalidate_cache()
        return path.fs.isdir(path.key)


def exists(path: Location) -> bool:
    """Whether there is a file or folder."""
    if isinstance(path, Path):
        return path.exists()
    with os_errors(path):
        path.fs.invalidate_cache()
        return path.fs.exists(path.key)


def subfolders(path: Location) -> list[Location]:
    """The folders in a folder, in no order; none if it does not exist."""
    if isinstance(path, Path):
        return [entry for entry in path.iterdir() if entry.is_dir()] if path.is_dir() else []
    return [path / name for name, entry in _listing(path).items() if entry["type"] == "directory"]


def files(path: Location) -> dict[str, tuple[int, float]]:
    """{name: (size in bytes, time of the last change in seconds)} of the files in a folder."""
    found = {}
    if isinstance(path, Path):
        for local in os.scandir(path):
            with suppress(FileNotFoundError):  # gone since: another's temporary file
                about = local.stat(follow_symlinks=False)
                if not stat.S_ISDIR(about.st_mode):
                    found[local.name] = (about.st_size, about.st_mtime)
        return found
    for name, entry in _listing(path).items():
        if entry["type"] != "directory":
            with os_errors(path):
                changed = path.fs.modified(entry["name"]).timestamp()
            found[name] = (entry["size"], changed)
    return found


def listed_sizes(path: Location) -> dict[str, int | None]:
    """{name: bytes} of the files behind a URL, in one request; nothing where it cannot be listed.

    Without requests there is nothing to save: of a local folder nothing is said.
    """
    if isinstance(path, Path):
        return {}
    try:
        entries = _listing(path)
    except OSError:
        return {}
    return {n: entry["size"] for n, entry in entries.items() if entry["type"] != "directory"}


def _listing(path: RemotePath) -> dict[str, dict[str, Any]]:
    with os_errors(path):
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


def file_size(path: Location, *, links: bool = False) -> int:
    """Bytes of a plain file. OSError if there is none, or if it is a folder, a device or a link.

    A link in a stranger's checkpoint could lead anywhere, and a pipe would never end. `links` lets
    links pass: for files that the user named, and for those that `inside` has looked at.
    """
    if isinstance(path, Path):
        about = path.stat() if links else path.lstat()
        if not stat.S_ISREG(about.st_mode):
            raise OSError(f"{path} is not a plain file but a link, folder or device")
        return about.st_size
    with os_errors(path):
        path.fs.invalidate_cache()
        size = path.fs.size(path.key)
    if size is None:
        raise OSError(f"{path}: the server does not say how many bytes it has; copy it here first")
    return int(size)


def file_version(path: Location) -> str:
    """A text that changes when a file is written again: size and time, or what a store has."""
    if isinstance(path, Path):
        about = path.stat()
        return f"{about.st_size} {about.st_mtime_ns}"
    with os_errors(path):
        path.fs.invalidate_cache()
        return str(path.fs.ukey(path.key))


def open_plain(path: Path) -> int:
    """A descriptor of a plain local file, for reading; links are followed.

    Opening a pipe waits for whoever writes into it, and a device may do anything.

    Raises:
        OSError: there is none, it cannot be read, or it is a folder, a pipe, a socket or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a plain file but a folder, pipe or device")
    return descriptor


def read_file(path: Location, limit: int, *, links: bool = False) -> bytes:
    """A whole small file.

    Args:
        path: the file.
        limit: most bytes that are read; see `xlstm_io.foreign.untrusted.LIMITS`.
        links: whether it may be a link; see `file_size`.

    Raises:
        OSError: it is not a plain file, cannot be read, or is larger than `limit`.
    """
    data: bytes | None = None
    if isinstance(path, Path):
        size: int | None = file_size(path, links=links)
    else:
        with os_errors(path):
            path.fs.invalidate_cache()
            size = path.fs.size(path.key)  # None where a server does not say
    if size is None:
        with open_file(path) as file, os_errors(path):
            parts, size = [], 0
            while size <= limit and (part := file.read(1 << 20)):
                parts.append(part)
                size += len(part)
        data = b"".join(parts)
    if size > limit:
        raise OSError(f"{path} has {size} bytes or more; more than {limit} are not read")
    if data is not None:
        return data
    if isinstance(path, Path):
        with open(open_plain(path), "rb") as file:
            return file.read(limit)
    with os_errors(path):
        return bytes(path.fs.cat_file(path.key))


def open_file(path: Location) -> BinaryIO:
    """An existing file, opened for reading from its start."""
    if isinstance(path, Path):
        return open(open_plain(path), "rb")
    with os_errors(path):
        return cast(BinaryIO, path.fs.open(path.key, "rb"))


PORTION_BYTES = 32 << 20
"""What is read of a remote file at once, since it is in memory twice for a moment."""


#: Local files that a reader keeps open. A checkpoint has one for each rank of its run, an average
#: reads several checkpoints at once, and a process has often no more than 1024 descriptors.
OPEN_FILES = 32


class RangeReader:
    """Reads ranges of files into memory of the caller's, in one thread at a time.

    The local files that were read last stay open in between, at most `OPEN_FILES`.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def read_into(self, path: Location, begin: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a file from `begin` on; OSError if it has too few."""
        if isinstance(path, Path):
            descriptor, done = self._descriptor(path), 0
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], begin + done)
                if count == 0:
                    break
                done += count
        else:
            done = 0
            while done < len(buffer):
                wanted = min(PORTION_BYTES, len(buffer) - done)
                start = begin + done
                with os_errors(path):
                    data = path.fs.cat_file(path.key, start=start, end=start + wanted)
                if len(data) > wanted:
                    raise OSError(f"{path}: the server sends whole files only; copy it here first")
                buffer[done : done + len(data)] = data
                done += len(data)
                if len(data) < wanted:
                    break
        if done != len(buffer):
            raise OSError(f"{path} ends at byte {begin + done}, {len(buffer) - done} too early")

    def _descriptor(self, path: Path) -> int:
        if path not in self._open:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        self._open.move_to_end(path)
        return self._open[path]

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
        with os_errors(path), path.fs.open(path.key, "wb") as file:
            yield file


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` when the block has ended.

    It is a temporary file beside `path`, synced and renamed. When the block is left by an
    exception it is removed, and `path` is what it was. Without `sync` a loss of power may leave
    other bytes: for files whose readers check them, as waiting for the disk takes milliseconds.
    """
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def write_atomic(
    path: Location, data: bytes, *, sync: bool = True, make_parents: bool = True
) -> None:
    """Write a small file so that `path` is either absent, the old file, or complete.

    Locally by `replacing`; an object store shows an object when it is complete.

    Args:
        path: where it goes.
        data: its bytes.
        sync: see `replacing`.
        make_parents: create missing folders. Without it a folder that someone removed meanwhile
            is an error.
    """
    if isinstance(path, Path):
        if make_parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, sync=sync) as file:
            file.write(data)
    else:
        with os_errors(path):
            path.fs.pipe_file(path.key, data)


def make_folder(path: Location) -> None:
    """Create a new folder and its parents; FileExistsError if it exists (not on object stores)."""
    if isinstance(path, Path):
        path.mkdir(parents=True)
    else:
        with os_errors(path):
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
        with os_errors(path):
            path.fs.rm_file(path.key)


def remove_folder(path: Location) -> None:
    """Delete a folder and all that is in it."""
    if isinstance(path, Path):
        shutil.rmtree(path)
    else:
        with os_errors(path):
            path.fs.rm(path.key, recursive=True)
            path.fs.invalidate_cache()


def temporary_path(path: Path) -> Path:
    """A name beside `path` for a file in the making, which no other process uses.

    It carries host and process: jobs on several nodes may write into one folder.
    """
    return path.with_name(f"{path.name}.tmp.{socket.gethostname()}.{os.getpid()}")


def remove_temporaries(folder: Path, below: str = "**/*") -> None:
    """Remove what killed processes left in `folder`, when no other process writes there."""
    for path in list(folder.glob(f"{below}.tmp.*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
