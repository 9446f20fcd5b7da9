"""Documents out of files: jsonl (plain, gz, zst), parquet, text files, and folders of them.

A record is numbered by its place in the file (line, table row; a text file is one record), good or
not, so that "record 17 of this file" means the same in every pass and can be found without parsing
the others. What cannot be a document comes out as ``Malformed`` with file and line: counting and
deciding is the caller's business.
"""

from __future__ import annotations

import glob
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import zstandard

from data_prep.errors import PrepError

JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
TEXT_SUFFIXES = {".txt", ".text", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cc", ".cpp", ".html"}
COMPRESSION_SUFFIXES = {".gz", ".zst"}
PROVENANCE_NAME = "SOURCE.json"
"""Licence and origin of the files beside it; never read as documents."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Document:
    """One text with its place: ``record`` is its number in the file, from 0."""

    record: int
    id: str
    text: str


@dataclass(frozen=True)
class Malformed:
    """A record that is not a document; ``where`` is file:line (or file:row), both from 1."""

    record: int
    where: str
    reason: str


def _suffix(path: Path) -> tuple[str, str]:
    """(content suffix, compression suffix or "")."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSION_SUFFIXES:
        return Path(path.stem).suffix.lower(), suffix
    return suffix, ""


def _readable(path: Path) -> bool:
    known = JSON_SUFFIXES | TEXT_SUFFIXES | {".parquet"}
    return _suffix(path)[0] in known and path.name != PROVENANCE_NAME


def expand_inputs(patterns: list[str]) -> list[Path]:
    """Files that paths, folders and globs stand for: sorted, each once.

    A folder stands for the files below it with a known suffix; a file named directly or by a glob
    is taken whatever its suffix (an unknown one is read as text).

    Raises:
        PrepError: a pattern that stands for nothing, or only for empty files.
    """
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        names = [path] if path.exists() else [Path(p) for p in glob.glob(str(path), recursive=True)]
        if not names:
            raise PrepError(f"--input {pattern}: no such file or folder, and no file matches it")
        files: list[Path] = []
        for name in sorted(names):
            if name.is_dir():
                below = (p for p in name.rglob("*") if p.is_file() and _readable(p))
                files += (p for p in below if not _hidden(p, name))
            elif name.name != PROVENANCE_NAME:
                files.append(name)
        if not files:
            known = ", ".join(sorted(JSON_SUFFIXES | {".parquet"} | TEXT_SUFFIXES))
            raise PrepError(
                f"--input {pattern}: no readable file in it (looked for {known}, also with .gz or "
                ".zst); name other text files by a glob, for example 'folder/**/*.log'"
            )
        if not any(file.stat().st_size for file in files):
            raise PrepError(f"--input {pattern}: empty ({len(files)} files of 0 bytes)")
        found.update(files)
    return sorted(found)


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def read_documents(
    path: Path, text_field: str = "text", wanted: np.ndarray | None = None
) -> Iterator[Document | Malformed]:
    """Documents of one file in order.

    Args:
        path: jsonl, parquet or text by its suffix; .gz and .zst are taken off first.
        text_field: key (or column) of the text.
        wanted: sorted record numbers; only these are parsed, reading ends after the last.

    Raises:
        PrepError: the file cannot be read: missing, truncated, or not of its kind.
    """
    kind, _ = _suffix(path)
    reader = {".parquet": _read_parquet}.get(kind, _read_text)
    if kind in JSON_SUFFIXES:
        reader = _read_json_lines
    try:
        yield from reader(path, text_field, wanted)
    except PrepError:
        raise
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise PrepError(f"{path}: cannot be read ({error}); is it complete?") from error


def open_stream(path: Path) -> io.BufferedIOBase:
    """The decompressed bytes of a file. A truncated archive raises when its end is reached."""
    compression = _suffix(path)[1]
    if compression == ".gz":
        return gzip.open(path, "rb")
    if compression == ".zst":
        return io.BufferedReader(_ZstdFile(path), _CHUNK)
    return open(path, "rb", buffering=_CHUNK)


class _ZstdFile(io.RawIOBase):
    """Zstandard frames as a stream.

    The library's own stream reader takes a truncated frame for the end of the file; documents
    would be lost without a word.
    """

    def __init__(self, path: Path):
        self._path, self._file = path, open(path, "rb")
        self._frame = None
        self._ready = b""
        self._input = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            self._input = self._input or self._file.read(_CHUNK)
            if not self._input:
                if self._frame is not None:
                    raise PrepError(f"{self._path}: ends inside a zstd frame: it is truncated")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(self._input)
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _read_json_lines(path, text_field, wanted) -> Iterator[Document | Malformed]:
    remaining = None if wanted is None else iter(wanted.tolist())
    target = None if remaining is None else next(remaining, None)
    with open_stream(path) as stream:
        for number, line in enumerate(stream):
            if remaining is not None:
                if target is None:
                    return
                if number != target:
                    continue
                target = next(remaining, None)
            if line.isspace():
                continue
            yield _parse_json(path, number, line, text_field)


def _parse_json(path: Path, number: int, line: bytes, text_field: str) -> Document | Malformed:
    where = f"{path}:{number + 1}"
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Malformed(number, where, f"not JSON: {error}")
    if not isinstance(record, dict):
        return Malformed(number, where, f"a JSON {type(record).__name__}, not an object")
    text = record.get(text_field)
    if not isinstance(text, str):
        keys = ", ".join(sorted(map(str, record))[:8])
        return Malformed(number, where, f"no text in field {text_field!r}; it has: {keys}")
    return Document(number, str(record.get("id", f"{path.name}:{number + 1}")), text)


def _read_parquet(path, text_field, wanted) -> Iterator[Document | Malformed]:
    import pyarrow as pa  # slow to import, needed for this format alone
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise PrepError(f"{path}: not a parquet file ({error})") from None
    with file:
        names = file.schema_arrow.names
        if text_field not in names:
            raise PrepError(
                f"{path}: no column {text_field!r}; set --text-field to one of {', '.join(names)}"
            )
        kept = None if wanted is None else set(wanted.tolist())
        columns = [text_field] + (["id"] if "id" in names and text_field != "id" else [])
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            texts = batch.column(0).to_pylist()
            ids = batch.column(1).to_pylist() if len(columns) > 1 else [None] * len(texts)
            for text, name in zip(texts, ids, strict=True):
                if kept is None or number in kept:
                    where = f"{path}:{number + 1}"
                    if isinstance(text, str):
                        label = f"{path.name}:{number + 1}" if name is None else str(name)
                        yield Document(number, label, text)
                    else:
                        kind = "null" if text is None else type(text).__name__
                        yield Malformed(number, where, f"{kind} in column {text_field!r}")
                number += 1


def _read_text(path, text_field, wanted) -> Iterator[Document | Malformed]:
    if wanted is not None and not len(wanted):
        return
    with open_stream(path) as stream:
        raw = stream.read()
    try:
        yield Document(0, path.name, raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield Malformed(0, f"{path}:{line}", f"not UTF-8 (byte {error.start}): {error.reason}")
