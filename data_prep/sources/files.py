"""Input files by local path or URL: finding, fingerprinting, opening and decompressing them.

A local file is named by its plain path, anything else by an fsspec URL (`s3://bucket/a.jsonl.zst`,
`memory://a.txt`, `zip://*.jsonl::archive.zip`); the protocol's own package must be installed.
"""

import glob
import gzip
import io
import json
import os
import posixpath
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from xlstm_io.errors import PrepError
from xlstm_io.remote import file_system, is_remote, os_errors

JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
TEXT_SUFFIXES = {".txt", ".text", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cc", ".cpp", ".html"}
COMPRESSION_SUFFIXES = {".gz", ".zst"}
TABLE_SUFFIXES = {".parquet", ".arrow"}
PROVENANCE_NAME = "SOURCE.json"
"""Licence and origin of the files beside it; never read as documents."""

_CHUNK = 1 << 20
# What Hugging Face datasets keeps beside the rows of a dataset saved to disk.
_DATASET_STATE, _DATASET_INFO = "state.json", "dataset_info.json"
_DATASET_DICT = "dataset_dict.json"
# What file systems of fsspec call that which changes with the contents.
_CHANGE_TAGS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "mtime", "LastModified"),
    *("Last-Modified", "last_modified", "created", "CRC"),
)


def _name(path: str) -> str:
    """A path, or the part of a URL that names the file."""
    return path.split("::")[0].split("?")[0] if is_remote(path) else path


def absolute(path: str) -> str:
    """The same file, whatever the working directory will be."""
    return path if is_remote(path) else os.path.abspath(path)


def suffixes(path: str) -> tuple[str, str]:
    """(content suffix, compression suffix or "") of a path or URL, lower case."""
    stem, suffix = posixpath.splitext(_name(path).lower())
    if suffix in COMPRESSION_SUFFIXES:
        return posixpath.splitext(stem)[1], suffix
    return suffix, ""


def base_name(path: str) -> str:
    """Last part of a path or URL."""
    return posixpath.basename(_name(path))


def _readable(path: str) -> bool:
    name = base_name(path)
    known = JSON_SUFFIXES | TEXT_SUFFIXES | TABLE_SUFFIXES
    beside = {PROVENANCE_NAME, _DATASET_STATE, _DATASET_INFO, _DATASET_DICT}
    return suffixes(path)[0] in known and name not in beside


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))


def expand_inputs(patterns: list[str]) -> list[str]:
    """Files that paths, folders, globs and URLs stand for: sorted, each once.

    A folder stands for the files below it with a known suffix; a file named directly or by a glob
    is taken whatever its suffix (an unknown one is read as text).

    Raises:
        PrepError: a pattern that stands for nothing, or only for empty files.
    """
    found: set[str] = set()
    for pattern in patterns:
        expand = _expand_remote if is_remote(pattern) else _expand_local
        files = expand(pattern)
        if not files:
            known = ", ".join(sorted(JSON_SUFFIXES | TABLE_SUFFIXES | TEXT_SUFFIXES))
            raise PrepError(
                f"--input {pattern}: no readable file in it (looked for {known}, also with .gz or "
                ".zst); name other text files by a glob, for example 'folder/**/*.log'"
            )
        if not any(file_size(file) for file in files):
            raise PrepError(f"--input {pattern}: empty ({len(files)} files of 0 bytes)")
        found.update(files)
    # By parts, as in a walk through the folders: "a/b.txt" before "a.txt".
    return sorted(found, key=lambda path: path.split("/"))


def _nothing(pattern: str) -> PrepError:
    return PrepError(f"--input {pattern}: no such file or folder, and no file matches it")


def _expand_local(pattern: str) -> list[str]:
    path = Path(pattern).expanduser()
    names = [path] if path.exists() else [Path(p) for p in glob.glob(str(path), recursive=True)]
    if not names:
        raise _nothing(pattern)
    files: list[str] = []
    for name in sorted(names):
        if name.is_dir():
            below = [p.relative_to(name).as_posix() for p in name.rglob("*") if p.is_file()]
            chosen = _files_of_folder(below, _reader_of(name))
            files += (str(name / part) for part in chosen)
        elif name.name != PROVENANCE_NAME:
            files.append(str(name))
    return files


def _reader_of(folder: Path) -> Callable[[str], bytes]:
    return lambda part: (folder / part).read_bytes()


def _expand_remote(pattern: str) -> list[str]:
    first, *rest = pattern.split("::")
    protocol = first.partition("://")[0]
    with _errors_of(pattern):
        fs, path = file_system(pattern)
        if glob.has_magic(path):
            names = [name for name in fs.glob(path) if not fs.isdir(name)]
            if not names:
                raise _nothing(pattern)
        elif fs.isdir(path):
            root = path.rstrip("/")
            below = [name[len(root) :].lstrip("/") for name in fs.find(root)]
            chosen = _files_of_folder(below, lambda part: fs.cat_file(f"{root}/{part}"))
            names = [f"{root}/{part}" for part in chosen]
        else:
            names = [path] if fs.exists(path) else []
            if not names:
                raise _nothing(pattern)
    whole = (name if "://" in name else f"{protocol}://{name}" for name in names)
    return ["::".join([name, *rest]) for name in whole if base_name(name) != PROVENANCE_NAME]


def _files_of_folder(below: list[str], read: Callable[[str], bytes]) -> list[str]:
    """The files to read among those `below` a folder (relative); `read(part)` gives bytes.

    Raises:
        PrepError: a Hugging Face dataset of several splits, of which one must be chosen.
    """
    present = set(below)
    unwanted: set[str] = set()
    for part in below:
        folder, _, name = part.rpartition("/")
        where = f"{folder}/" if folder else ""
        if name == _DATASET_DICT:
            splits = json.loads(read(part))["splits"]
            raise PrepError(
                f"--input: {where or 'this folder'} is a Hugging Face dataset with the splits "
                f"{', '.join(splits)}; name the folder of one"
            )
        if name == _DATASET_STATE and f"{where}{_DATASET_INFO}" in present:
            state = json.loads(read(part))
            if state.get("_indices_files") or state.get("_indices_data_files"):
                raise PrepError(
                    f"--input: {where or 'this folder'} is a Hugging Face dataset saved with a "
                    "selection of its rows; save it again after flatten_indices()"
                )
            own = {f"{where}{item['filename']}" for item in state["_data_files"]}
            near = {p for p in below if p.startswith(where) and "/" not in p[len(where) :]}
            unwanted |= {p for p in near if p.endswith(".arrow")} - own  # caches of map and filter
    kept = (p for p in below if p not in unwanted and _readable(p) and not _hidden(p))
    return sorted(kept)


@contextmanager
def _errors_of(path: str) -> Iterator[None]:
    """Turn what a remote file system raises into a PrepError that names the file."""
    try:
        with os_errors(path):
            yield
    except OSError as error:
        raise PrepError(
            f"{path}: cannot be read ({str(error).removeprefix(f'{path}: ')})"
        ) from error


def file_size(path: str) -> int:
    """Bytes of a file as stored (0 where a server does not say)."""
    if not is_remote(path):
        return os.stat(path).st_size
    with _errors_of(path):
        fs, name = file_system(path)
        return fs.info(name).get("size") or 0


def file_fingerprint(path: str) -> list[Any]:
    """What tells cheaply that a file is unchanged: path, size, modification time or tag."""
    if not is_remote(path):
        stat = os.stat(path)
        return [os.path.realpath(path), stat.st_size, stat.st_mtime_ns]
    with _errors_of(path):
        fs, name = file_system(path)
        info = fs.info(name)
        tag = next((str(info[tag]) for tag in _CHANGE_TAGS if tag in info), None)
        return [path, info.get("size"), tag]


def open_raw(path: str) -> BinaryIO:
    """The bytes of a file as stored."""
    if not is_remote(path):
        return open(path, "rb", buffering=_CHUNK)
    with _errors_of(path):
        fs, name = file_system(path)
        return io.BufferedReader(_RemoteFile(path, fs.open(name, "rb")), _CHUNK)


def open_stream(path: str) -> BinaryIO:
    """The decompressed bytes of a file. A truncated archive raises when its end is reached."""
    compression = suffixes(path)[1]
    raw = open_raw(path)
    if compression == ".gz":
        return cast(BinaryIO, _GzipFile(raw))
    if compression == ".zst":
        return io.BufferedReader(_ZstdFile(path, raw), _CHUNK)
    return raw


class _RemoteFile(io.RawIOBase):
    """A file of fsspec under a buffer: its own `readline` is slow, its errors are of any kind."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        self._path, self._file = path, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _errors_of(self._path):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        with _errors_of(self._path):
            data = self._file.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


class _GzipFile(gzip.GzipFile):
    def __init__(self, raw: BinaryIO) -> None:
        super().__init__(fileobj=raw, mode="rb")
        self.myfileobj = cast(io.FileIO, raw)  # closed together with this stream


class _ZstdFile(io.RawIOBase):
    """Zstandard frames as a stream.

    The library's own stream reader takes a truncated frame for the end of the file; documents
    would be lost without a word.
    """

    def __init__(self, path: str, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._ready = b""
        self._input = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while not self._ready:
            self._input = self._input or self._file.read(_CHUNK)
            if not self._input:
                if self._frame is not None:
                    raise PrepError(f"{self._path}: ends inside a zstd frame: it is truncated")
                return 0
            frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._ready = frame.decompress(self._input)
            self._input, self._frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        count = min(len(view), len(self._ready))
        view[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def provenance_notes(paths: list[str]) -> list[dict[str, Any]]:
    """The notes `SOURCE.json` beside the files: licence and origin.

    Raises:
        PrepError: a note is not JSON.
    """
    notes = []
    for folder in sorted({_folder(path) for path in paths}):
        head, *rest = folder.split("::") if is_remote(folder) else [folder]
        file = "::".join([posixpath.join(head, PROVENANCE_NAME), *rest])
        try:
            with open_raw(file) as stream:
                raw = stream.read()
        except (OSError, PrepError):
            continue  # none there
        try:
            note = json.loads(raw)
        except ValueError as error:
            raise PrepError(f"{file}: not JSON ({error}); repair or remove it") from None
        notes.append(note if isinstance(note, dict) else {"note": note})
    return notes


def _folder(path: str) -> str:
    head, *rest = path.split("::") if is_remote(path) else [path]
    return "::".join([posixpath.dirname(head), *rest])
