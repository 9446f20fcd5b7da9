"""What readers give: documents, and records that are none; and where both lie in a file."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import xxhash

from data_prep.sources.rules import FieldRule
from xlstm_io.terminal import one_line

TextSplit = Literal["file", "lines", "paragraphs"]

LARGEST_TEXT = 16 << 20
"""Bytes of the largest document that is read, whatever it is read from. Memory follows the largest
document: a Hugging Face tokenizer takes some 110 bytes for each of its bytes, SentencePiece up to
70. So a process that encodes stays below 2 GiB. The largest books have 5 MB."""

LARGEST_LINE = 4 * LARGEST_TEXT
"""Bytes of the longest line of JSON that is read: the text with its escapes, and other fields."""

SPLIT_IT = "set --text-split, or cut it into several documents"


@dataclass(frozen=True)
class Fields:
    """Where the documents are within a file.

    Attributes:
        text: key (jsonl) or column (parquet, arrow) of the text; `content.text` is the field `text`
            within the field `content`.
        id: key or column of the document's name; file and record where there is none.
        split: what of a text file is a document: all of it, each line, or what blank lines
            separate.
        keep: rules on other fields.
        prompt: key of a text that is read and not learnt; with `completion` in place of `text`.
        completion: key of the text behind it, which is learnt.
        segments: key of a list of `{"text": ..., "loss": true|false}` in place of all these.
    """

    text: str = "text"
    id: str = "id"
    split: TextSplit = "file"
    # Not in the representation, after which stored scans of earlier versions are named.
    keep: tuple[FieldRule, ...] = field(default=(), repr=False)
    prompt: str = field(default="", repr=False)
    completion: str = field(default="", repr=False)
    segments: str = field(default="", repr=False)

    @property
    def texts(self) -> tuple[str, ...]:
        """The fields that hold the text, in their order; `segments` is none of them."""
        return (self.prompt, self.completion) if self.prompt else (self.text,)

    @property
    def labelled(self) -> bool:
        """Whether some parts of a document are learnt and others are not."""
        return bool(self.prompt or self.segments)


DEFAULT_FIELDS = Fields()


class Part(NamedTuple):
    """A part of a document, and whether the loss of its tokens counts."""

    text: str
    learnt: bool


@dataclass(frozen=True)
class Document:
    """One text with its place.

    Attributes:
        record: its number in the file, from 0.
        id: its name, for messages.
        text: the text.
        offset: byte at which it starts in an uncompressed file of lines, else 0; reading may begin
            there, see `read_documents`.
        stored: bytes of its record in the file.
        values: of the fields for which there are rules, in the order of `Fields.keep`; None where a
            field is not there.
        parts: what the text consists of, where some of it is not learnt.
    """

    record: int
    id: str
    text: str
    offset: int = 0
    stored: int = field(default=0, compare=False)
    values: tuple[Any, ...] = ()
    parts: tuple[Part, ...] = ()

    def identity(self, data: bytes) -> bytes:
        """What the document is known by: `data`, its text in UTF-8, and where it is learnt."""
        if not self.parts:
            return data
        shape = ",".join(f"{len(part.text)}{'+' if part.learnt else '-'}" for part in self.parts)
        return data + b"\xff" + shape.encode()  # a byte that no UTF-8 has


@dataclass(frozen=True)
class Malformed:
    """A record that is not a document.

    Attributes:
        record: its number in the file, from 0.
        where: file:line or file:row, counted from 1.
        reason: why it is not a document.
        stored: bytes of the record in the file.
    """

    record: int
    where: str
    reason: str
    stored: int = field(default=0, compare=False)


Item = Document | Malformed


def text_hash(data: bytes) -> tuple[int, int]:
    """xxh3-128 of a text (its UTF-8 bytes) as two 64-bit halves: high, low."""
    value = xxhash.xxh3_128_intdigest(data)
    return value >> 64, value & (1 << 64) - 1


def is_empty(text: str) -> bool:
    """Whether a text says nothing: it has no character, or only white space."""
    return not text or text.isspace()


def printable(name: object) -> str:
    """A stranger's word for a message: no line break and no escape code reaches a terminal."""
    text = str(name)
    return one_line(text if len(text) <= 80 else f"{text[:80]}...")


def too_large(size: int, *, at_least: bool = False) -> str:
    """Why a document of `size` bytes is not read."""
    return (
        f"a document of {size >> 20} MiB{' or more' if at_least else ''}; the largest that is read "
        f"has {LARGEST_TEXT >> 20} MiB: {SPLIT_IT}"
    )
