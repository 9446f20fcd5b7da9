"""Documents out of files: jsonl, parquet, Hugging Face datasets saved to disk (arrow), text.

A record is numbered by its place in the file (line, table row, part of a text), good or not. So
"record 17 of this file" means the same in every pass and can be found without parsing the others.
What cannot be a document comes out as `Malformed` with file and line; the caller counts them and
decides.
"""

import itertools
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import orjson
import xxhash
import zstandard

from data_prep.sources.files import JSON_SUFFIXES, base_name, open_raw, open_stream, suffixes
from xlstm_io.errors import PrepError

if TYPE_CHECKING:
    import pyarrow as pa

_TABLE_ROWS = 1024
TextSplit = Literal["file", "lines", "paragraphs"]


@dataclass(frozen=True)
class Fields:
    """Where the documents are within a file.

    Attributes:
        text: key (jsonl) or column (parquet, arrow) of the text.
        id: key or column of the document's name; file and record where there is none.
        split: what of a text file is a document: all of it, each line, or what blank lines
            separate.
    """

    text: str = "text"
    id: str = "id"
    split: TextSplit = "file"


DEFAULT_FIELDS = Fields()


@dataclass(frozen=True)
class Document:
    """One text with its place.

    Attributes:
        record: its number in the file, from 0.
        id: its name, for messages.
        text: the text.
        offset: byte at which it starts in an uncompressed file of lines, else 0; reading may begin
            there, see `read_documents`.
    """

    record: int
    id: str
    text: str
    offset: int = 0


@dataclass(frozen=True)
class Malformed:
    """A record that is not a document.

    Attributes:
        record: its number in the file, from 0.
        where: file:line or file:row, counted from 1.
        reason: why it is not a document.
    """

    record: int
    where: str
    reason: str


Item = Document | Malformed

QUOTED_MALFORMED = 5
"""Malformed records that commands print; more are only counted."""


def text_hash(data: bytes) -> tuple[int, int]:
    """xxh3-128 of a text (its UTF-8 bytes) as two 64-bit halves: high, low."""
    value = xxhash.xxh3_128_intdigest(data)
    return value >> 64, value & (1 << 64) - 1


def read_documents(
    path: str,
    fields: Fields = DEFAULT_FIELDS,
    wanted: np.ndarray | None = None,
    offset: int = 0,
) -> Iterator[Item]:
    """Documents of one file in order.

    Args:
        path: jsonl, parquet, arrow or text by its suffix; .gz and .zst are taken off first.
        fields: which part of a record is its text.
        wanted: sorted record numbers; only these are parsed, reading ends after the last.
        offset: `Document.offset` of the first wanted record: what precedes is not even read.

    Raises:
        PrepError: the file cannot be read: missing, truncated, or not of its kind.
    """
    path = str(path)
    if wanted is not None and not len(wanted):
        return
    kind, _ = suffixes(path)
    try:
        if kind in JSON_SUFFIXES:
            yield from _read_json_lines(path, fields, wanted, offset)
        elif kind == ".parquet":
            yield from _read_parquet(path, fields, wanted)
        elif kind == ".arrow":
            yield from _read_arrow(path, fields, wanted)
        elif fields.split == "file":
            yield from _read_text(path)
        else:
            yield from _read_parts(path, fields.split, wanted)
    except PrepError:
        raise
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise PrepError(f"{path}: cannot be read ({error}); is it complete?") from error


def _read_json_lines(
    path: str, fields: Fields, wanted: np.ndarray | None, offset: int
) -> Iterator[Item]:
    remaining: Iterator[int] | None = None if wanted is None else iter(wanted.tolist())
    target = None if remaining is None else next(remaining)
    seekable = not suffixes(path)[1]
    with open_stream(path) as stream:
        first = 0
        if seekable and offset and target is not None:
            stream.seek(offset)
            first = target
        position = offset if seekable else 0
        for number, line in enumerate(stream, first):
            start = position
            position += len(line) if seekable else 0
            if remaining is not None:
                if target is None:
                    return
                if number != target:
                    continue
                target = next(remaining, None)
            if not line.isspace():
                yield _parse_json(path, number, line, fields, start)


def _parse_json(path: str, number: int, line: bytes, fields: Fields, offset: int) -> Item:
    where = f"{path}:{number + 1}"
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Malformed(number, where, f"not JSON: {error}")
    if not isinstance(record, dict):
        return Malformed(number, where, f"a JSON {type(record).__name__}, not an object")
    text = record.get(fields.text)
    if not isinstance(text, str):
        keys = ", ".join(sorted(map(str, record))[:8])
        return Malformed(number, where, f"no text in field {fields.text!r}; it has: {keys}")
    name = record.get(fields.id)
    label = f"{base_name(path)}:{number + 1}" if name is None else str(name)
    return Document(number, label, text, offset)


def _read_parquet(path: str, fields: Fields, wanted: np.ndarray | None) -> Iterator[Item]:
    import pyarrow as pa  # slow to import, needed for tables alone
    import pyarrow.parquet as pq

    with open_raw(path) as stream:
        try:
            file = pq.ParquetFile(stream)
        except pa.ArrowInvalid as error:
            raise PrepError(f"{path}: not a parquet file ({error})") from None
        columns = _columns(path, file.schema_arrow.names, fields)
        number = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if wanted is not None and number > wanted[-1]:
                return
            if _wants(wanted, number, rows):
                batches = file.iter_batches(_TABLE_ROWS, row_groups=[group], columns=columns)
                yield from _read_batches(path, batches, number, fields, wanted)
            number += rows


def _read_arrow(path: str, fields: Fields, wanted: np.ndarray | None) -> Iterator[Item]:
    import pyarrow as pa

    with open_stream(path) as stream:
        try:
            reader = pa.ipc.open_stream(stream)
        except pa.ArrowInvalid:
            try:
                stream.seek(0)
                file = pa.ipc.open_file(stream)
            except pa.ArrowInvalid as error:
                raise PrepError(f"{path}: not an arrow file ({error})") from None
            reader = (file.get_batch(number) for number in range(file.num_record_batches))
            names = file.schema.names
        else:
            names = reader.schema.names
        columns = _columns(path, names, fields)
        batches = (
            batch.select(columns).slice(first, _TABLE_ROWS)
            for batch in reader
            for first in range(0, batch.num_rows, _TABLE_ROWS)
        )
        try:
            yield from _read_batches(path, batches, 0, fields, wanted)
        except pa.ArrowInvalid as error:
            raise PrepError(f"{path}: cannot be read ({error}); is it complete?") from None


def _columns(path: str, names: list[str], fields: Fields) -> list[str]:
    if fields.text not in names:
        raise PrepError(
            f"{path}: no column {fields.text!r}; set --text-field to one of {', '.join(names)}"
        )
    named = fields.id in names and fields.id != fields.text
    return [fields.text, fields.id] if named else [fields.text]


def _wants(wanted: np.ndarray | None, first: int, rows: int) -> bool:
    if wanted is None:
        return True
    return bool(np.searchsorted(wanted, first) < np.searchsorted(wanted, first + rows))


def _read_batches(
    path: str,
    batches: "Iterable[pa.RecordBatch]",
    number: int,
    fields: Fields,
    wanted: np.ndarray | None,
) -> Iterator[Item]:
    """The rows of table batches, of which the first has the number `number`."""
    kept = None if wanted is None else set(wanted.tolist())
    for batch in batches:
        if wanted is not None and number > wanted[-1]:
            return
        if _wants(wanted, number, batch.num_rows):
            texts = batch.column(0).to_pylist()
            ids = batch.column(1).to_pylist() if batch.num_columns > 1 else itertools.repeat(None)
            for record, (text, name) in enumerate(zip(texts, ids, strict=False), number):
                if kept is not None and record not in kept:
                    continue
                if isinstance(text, str):
                    label = f"{base_name(path)}:{record + 1}" if name is None else str(name)
                    yield Document(record, label, text)
                else:
                    kind = "null" if text is None else type(text).__name__
                    reason = f"{kind} in column {fields.text!r}"
                    yield Malformed(record, f"{path}:{record + 1}", reason)
        number += batch.num_rows


def _read_text(path: str) -> Iterator[Item]:
    with open_stream(path) as stream:
        raw = stream.read()
    yield _decode(path, 0, 1, raw, base_name(path))


def _decode(path: str, record: int, first_line: int, raw: bytes, label: str) -> Item:
    try:
        return Document(record, label, raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        reason = f"not UTF-8 (byte {error.start}): {error.reason}"
        return Malformed(record, f"{path}:{line}", reason)


def _read_parts(path: str, split: TextSplit, wanted: np.ndarray | None) -> Iterator[Item]:
    """A text file in parts, whatever its size: its lines, or what blank lines separate."""
    kept = None if wanted is None else set(wanted.tolist())
    with open_stream(path) as stream:
        parts = _lines(stream) if split == "lines" else _paragraphs(stream)
        for record, (first_line, raw) in enumerate(parts):
            if wanted is not None and record > wanted[-1]:
                return
            if kept is None or record in kept:
                yield _decode(path, record, first_line, raw, f"{base_name(path)}:{first_line}")


def _lines(stream: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line without its end) of every line that is not blank."""
    for number, line in enumerate(stream, 1):
        if not line.isspace():
            yield number, line.rstrip(b"\r\n")


def _paragraphs(stream: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """(number of its first line from 1, lines) of all that blank lines separate."""
    first, held = 0, list[bytes]()
    for number, line in enumerate(stream, 1):
        if not line.isspace():
            first = first or number
            held.append(line)
        elif held:
            yield first, b"".join(held).rstrip(b"\r\n")
            first, held = 0, []
    if held:
        yield first, b"".join(held).rstrip(b"\r\n")
