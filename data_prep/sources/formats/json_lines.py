"""Documents out of JSON lines.

A line is parsed by orjson. One that orjson refuses is read again by a parser that knows only how
JSON is nested, because what is not read must not decide: `NaN`, a number beyond every float, a
thousand levels or half of a surrogate pair in one field say nothing about the text in another.
"""

import codecs
import re
from collections.abc import Iterator
from functools import partial
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

import numpy as np
import orjson

from data_prep.sources.documents import (
    LARGEST_LINE,
    LARGEST_TEXT,
    Document,
    Fields,
    Item,
    Malformed,
    Part,
    printable,
    too_large,
)
from data_prep.sources.formats.lines import bounded_lines, chosen, numbered_records
from data_prep.sources.names import base_name
from data_prep.sources.streams import open_text

_MISSING = object()
_PlacedLine = tuple[bytes | None, int, int]
"""A line as `bounded_lines` gives it, and the byte at which it starts; 0 in a compressed file."""


def read_json_lines(
    path: str, fields: Fields, wanted: np.ndarray | None, offset: int
) -> Iterator[Item]:
    """Documents of a file of JSON lines in order; for the arguments see `read_documents`."""
    records: Iterator[tuple[int, _PlacedLine]]
    if wanted is None:
        records = enumerate(_placed_lines(path))
    elif offset:
        records = enumerate(_placed_lines(path, offset), int(wanted[0]))
    else:
        begin = partial(_placed_lines, path)
        records = numbered_records(path, "json", begin, int(wanted[0]))
    for number, (line, size, start) in chosen(records, wanted):
        if line is None:
            reason = f"a line of {size >> 20} MiB; at most {LARGEST_LINE >> 20} MiB are read"
            yield Malformed(number, f"{path}:{number + 1}", reason, size)
        elif not line.isspace():
            yield _parse(path, number, line, fields, start)


def _placed_lines(path: str, offset: int = 0) -> Iterator[_PlacedLine]:
    """The lines of a file, from the one at byte `offset` on where the file is not compressed."""
    with open_text(path) as stream:
        if offset and not stream.compressed:
            stream.seek(offset)
        position = 0 if stream.compressed else stream.tell()
        for line, size in bounded_lines(stream, LARGEST_LINE):
            yield line, size, position
            position += 0 if stream.compressed else size


def _parse(path: str, number: int, line: bytes, fields: Fields, offset: int) -> Item:
    try:
        record = _record(line)
        parts = _parts(record, fields) if fields.labelled else ()
        text = "".join(part.text for part in parts) if parts else _text(record, fields.text)
        _check_size(text)
    except ValueError as error:
        return Malformed(number, f"{path}:{number + 1}", str(error), len(line))
    name = find(record, fields.id)
    if isinstance(name, str | int | float):
        label = str(name).encode("utf-8", "replace").decode()
    else:
        label = f"{base_name(path)}:{number + 1}"
    values = tuple(_value(record, rule.field) for rule in fields.keep)
    return Document(number, label, text, offset, len(line), values, parts)


def _value(record: dict[str, Any], name: str) -> Any:
    value = find(record, name)
    return value if isinstance(value, bool | int | float | str) else None


def _record(line: bytes) -> dict[str, Any]:
    """The object of a line; ValueError with the reason where there is none."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            record = parse_leniently(line.removeprefix(codecs.BOM_UTF8))
        except ValueError:
            raise ValueError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    return record


def _text(record: dict[str, Any], name: str) -> str:
    """The text in a field; ValueError with the reason where there is none that can be used."""
    text = find(record, name)
    if text is None:
        return ""  # as an empty field of a table
    if isinstance(text, Unreadable):
        raise ValueError(f"field {name!r}: {text.reason}")
    if not isinstance(text, str):
        keys = ", ".join(sorted(map(printable, record))[:8])
        raise ValueError(f"no text in field {name!r}; it has: {keys}")
    if not text.isascii() and _SURROGATE.search(text):
        raise ValueError(
            f"field {name!r} has half of a surrogate pair, or bytes that are not UTF-8"
        )
    return text


def _check_size(text: str) -> None:
    if len(text) > LARGEST_TEXT // 4:  # a character has at most four bytes
        size = len(text.encode("utf-8", "replace"))
        if size > LARGEST_TEXT:
            raise ValueError(too_large(size))


def _parts(record: dict[str, Any], fields: Fields) -> tuple[Part, ...]:
    """The parts of a document of which some are not learnt; ValueError where there are none."""
    if not fields.segments:
        prompt, completion = _text(record, fields.prompt), _text(record, fields.completion)
        return Part(prompt, False), Part(completion, True)
    segments = find(record, fields.segments)
    if not isinstance(segments, list) or not segments:
        raise ValueError(f"no list with segments in field {fields.segments!r}")
    for number, segment in enumerate(segments, 1):
        if not isinstance(segment, dict) or not isinstance(segment.get("loss"), bool):
            raise ValueError(
                f"segment {number} in field {fields.segments!r} is not "
                '{"text": ..., "loss": true|false}'
            )
    return tuple(Part(_text(segment, "text"), segment["loss"]) for segment in segments)


def find(record: dict[str, Any], name: str) -> Any:
    """The value of a field; of `a.b` the field `b` within the field `a`, if there is no `a.b`."""
    if name in record:
        return record[name]
    value: Any = record if "." in name else _MISSING
    for key in name.split("."):
        value = value.get(key, _MISSING) if isinstance(value, dict) else _MISSING
    return value


class Unreadable:
    """A string of JSON that breaks the rules of strings.

    Attributes:
        reason: which one.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason


_SURROGATE = re.compile("[\ud800-\udfff]")
_TOKEN = re.compile(
    r'[ \t\r\n]*(?:([{}\[\],:])|("[^"\\]*(?:\\.[^"\\]*)*")|([^\s{}\[\],:"]+))', re.DOTALL
)
_NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|Infinity|NaN)")
_WORDS = {"true": True, "false": False, "null": None}
_MOST_WORDS = 1 << 20  # that the second parser reads of a line: some five seconds, 100 MB
_LONGEST_INTEGER = 300  # digits; longer ones are floats, which may be infinite


def parse_leniently(line: bytes) -> Any:
    """The value of a JSON text of any depth, with numbers of any size and any bytes in strings.

    A string that cannot be decoded becomes `Unreadable`; bytes that are not UTF-8 become
    surrogates.

    Raises:
        ValueError: it is not nested like JSON, a word of it is none of JSON's, or it has too many.
    """
    text = line.decode("utf-8", "surrogateescape").rstrip(" \t\r\n")
    top: list[Any] = []
    open_values: list[dict[str, Any] | list[Any]] = [top]
    keys: list[str] = [""]  # of each open value: the key whose value comes next
    place, expected, words = 0, {"value"}, 0
    while place < len(text):
        words += 1
        if words > _MOST_WORDS:
            raise ValueError(f"more than {_MOST_WORDS:,} values and marks")
        found = _TOKEN.match(text, place)
        if found is None:
            raise ValueError(f"unexpected character at {place}")
        mark, string, word = found.groups()
        inner = open_values[-1]
        kind = _token_kind(mark, inner, expected)
        if kind not in expected:
            raise ValueError(f"unexpected {kind} at {place}")
        place = found.end()
        if kind == "key":
            if string is None:
                raise ValueError(f"no key at {place}")
            key = _string(string)
            keys[-1], expected = key if isinstance(key, str) else string, {"colon"}
        elif kind == "colon":
            expected = {"value"}
        elif kind == "comma":
            expected = {"key"} if isinstance(inner, dict) else {"value"}
        elif kind == "close":
            open_values.pop()
            keys.pop()
            expected = _after_value(open_values)
        else:
            value: Any = {"{": {}, "[": []}.get(mark) if mark else None
            if not mark:
                value = _string(string) if string else _word(word)
            if isinstance(inner, dict):
                inner[keys[-1]] = value
            else:
                inner.append(value)
            if mark:
                open_values.append(value)
                keys.append("")
                expected = {"key", "close"} if mark == "{" else {"value", "close"}
            else:
                expected = _after_value(open_values)
    if expected != {"end"}:
        raise ValueError("it ends too early")
    return top[0]


def _after_value(open_values: list[Any]) -> set[str]:
    return {"end"} if len(open_values) == 1 else {"comma", "close"}


def _token_kind(mark: str | None, inner: Any, expected: set[str]) -> str:
    if mark == ("}" if isinstance(inner, dict) else "]"):
        return "close"
    if mark in ("}", "]"):
        return "wrong bracket"
    if mark in (":", ","):
        return {":": "colon", ",": "comma"}[mark]
    return "key" if "key" in expected and mark is None else "value"


def _string(token: str) -> str | Unreadable:
    try:
        return scanstring(token, 1, True)[0]
    except ValueError as error:
        return Unreadable(f"not JSON: {error}")


def _word(word: str) -> Any:
    if word in _WORDS:
        return _WORDS[word]
    if not _NUMBER.fullmatch(word):
        raise ValueError(f"{word[:20]!r} is not a value of JSON")
    if len(word) <= _LONGEST_INTEGER and word.lstrip("-").isdecimal():
        return int(word)
    return float(word)
