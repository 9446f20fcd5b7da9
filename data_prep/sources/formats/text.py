"""Documents out of text files: all of a file, its lines, or what blank lines separate."""

from collections.abc import Iterator
from functools import partial

import numpy as np

from data_prep.sources.documents import (
    LARGEST_TEXT,
    Document,
    Item,
    Malformed,
    TextSplit,
    too_large,
)
from data_prep.sources.formats.lines import bounded_lines, chosen, numbered_records
from data_prep.sources.names import base_name
from data_prep.sources.streams import Stream, open_text
from xlstm_io.errors import PrepError


def read_text(path: str) -> Iterator[Item]:
    """A text file as one document.

    Raises:
        PrepError: it is larger than any document that is read.
    """
    with open_text(path) as stream:
        raw = stream.read(LARGEST_TEXT + 1)
    if len(raw) > LARGEST_TEXT:
        raise PrepError(f"{path}: {too_large(len(raw), at_least=True)}")
    yield _decode(path, 0, 1, raw, base_name(path))


def read_parts(path: str, split: TextSplit, wanted: np.ndarray | None) -> Iterator[Item]:
    """A text file in parts, whatever its size: its lines, or what blank lines separate."""
    records: Iterator[tuple[int, _Part]]
    if wanted is None:
        records = enumerate(_parts(path, split))
    else:
        records = numbered_records(path, split, partial(_parts, path, split), int(wanted[0]))
    for record, (first_line, raw, size) in chosen(records, wanted):
        if raw is None:
            yield Malformed(record, f"{path}:{first_line}", too_large(size), size)
        else:
            yield _decode(path, record, first_line, raw, f"{base_name(path)}:{first_line}")


def _decode(path: str, record: int, first_line: int, raw: bytes, label: str) -> Item:
    try:
        return Document(record, label, raw.decode("utf-8"), stored=len(raw))
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        reason = f"not UTF-8 (byte {error.start}): {error.reason}"
        return Malformed(record, f"{path}:{line}", reason, len(raw))


_Part = tuple[int, bytes | None, int]
"""Number of its first line from 1; its bytes, None where they are too many; their count."""


def _parts(path: str, split: TextSplit) -> Iterator[_Part]:
    with open_text(path) as stream:
        yield from _lines(stream) if split == "lines" else _paragraphs(stream)


def _lines(stream: Stream) -> Iterator[_Part]:
    """Every line that is not blank, without its end."""
    for number, (line, size) in enumerate(bounded_lines(stream, LARGEST_TEXT), 1):
        if line is None:
            yield number, None, size
        elif not line.isspace():
            yield number, line.rstrip(b"\r\n"), size


def _paragraphs(stream: Stream) -> Iterator[_Part]:
    """All that blank lines separate."""
    first = size = 0
    held = list[bytes]()

    def part() -> _Part:
        whole = b"".join(held).rstrip(b"\r\n") if size <= LARGEST_TEXT else None
        return first, whole, size

    for number, (line, line_size) in enumerate(bounded_lines(stream, LARGEST_TEXT), 1):
        if line is None or not line.isspace():
            first, size = first or number, size + line_size
            if line is None or size > LARGEST_TEXT:
                held.clear()  # too much to keep; counted to its end
            else:
                held.append(line)
        elif first:
            yield part()
            first = size = 0
            held.clear()
    if first:
        yield part()
