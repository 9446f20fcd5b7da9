"""Opening a file for reading: its bytes as stored, decompressed, and as text.

What a file is follows from its first bytes, not from its name alone: a gzip file that is named
`.jsonl` is decompressed, and an archive or a table that is read as text is refused by its kind.
Every stream ends in an error, not in an end, where the file is cut short.
"""

import bz2
import codecs
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from data_prep.sources.names import COMPRESSION_SUFFIXES, suffixes
from xlstm_io.errors import PrepError
from xlstm_io.remote import file_system, is_remote, os_errors
from xlstm_io.storage import open_plain

CHUNK = 1 << 20
DECOMPRESSION_ERRORS = (zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""What the libraries raise, besides OSError, for a file that is damaged or cut short."""

# zstandard yields the output of a step whole, and 4 bytes may stand for 128 KB. So the input is fed
# in small steps: 8 KiB give 256 MB at the very worst. The other libraries bound their output.
_STEP = 1 << 13
_ZSTD_WINDOW = 1 << 31  # the largest that zstd can write (`--ultra --long=31`)
_GZIP = 31  # zlib's window bits for gzip's header and trailer

_HEAD = 1 << 12
_COMPRESSIONS = {
    ".gz": re.compile(rb"\x1f\x8b\x08"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # or a skippable frame
    ".xz": re.compile(rb"\xfd7zXZ\0"),
    ".bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
}
# What is not read as text: how it begins, its name, and what to do.
_ICONV = "write it as UTF-8, for example by `iconv -f {0} -t UTF-8`"
_KINDS = (
    (codecs.BOM_UTF32_LE, "UTF-32 text", _ICONV.format("UTF-32")),
    (codecs.BOM_UTF32_BE, "UTF-32 text", _ICONV.format("UTF-32")),
    (codecs.BOM_UTF16_LE, "UTF-16 text", _ICONV.format("UTF-16")),
    (codecs.BOM_UTF16_BE, "UTF-16 text", _ICONV.format("UTF-16")),
    (b"PK\3\4", "a zip archive", "unpack it, or name its files as 'zip://*.jsonl::FILE.zip'"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"Rar!", "a rar archive", "unpack it"),
    (b"\x04\x22\x4d\x18", "an lz4 file", "unpack it, or compress it by zstd"),
    (b"\x1f\x9d", "a file of `compress`", "unpack it by `gunzip`"),
    (b"%PDF-", "a PDF document", "extract its text first"),
    (b"PAR1", "a parquet table", "name it .parquet"),
    (b"ARROW1", "an arrow table", "name it .arrow"),
    (b"SQLite format 3", "an SQLite database", "export its table as JSON lines"),
    (b"\x89PNG", "a picture", "leave it out of --input"),
    (b"\xff\xd8\xff", "a picture", "leave it out of --input"),
    (b"GIF8", "a picture", "leave it out of --input"),
    (b"\x7fELF", "a program", "leave it out of --input"),
)
_TAR_MARK = slice(257, 262)


class Stream(io.BufferedReader):
    """The decompressed bytes of a file.

    Attributes:
        compressed: whether the bytes are not those of the file itself.
    """

    compressed = False


@contextmanager
def errors_of(path: str) -> Iterator[None]:
    """Turn what a remote file system raises into a PrepError that names the file."""
    try:
        with os_errors(path):
            yield
    except OSError as error:
        raise PrepError(
            f"{path}: cannot be read ({str(error).removeprefix(f'{path}: ')})"
        ) from error


def open_raw(path: str) -> Stream:
    """The bytes of a file as stored.

    Raises:
        PrepError: it is a pipe or a device; or a server does not give it.
    """
    if not is_remote(path):
        try:
            return Stream(io.FileIO(open_plain(Path(path))), CHUNK)
        except OSError as error:
            if error.errno is not None:
                raise
            raise PrepError(f"--input {error}; give files") from None
    with errors_of(path):
        fs, name = file_system(path)
        return Stream(_RemoteFile(path, fs.open(name, "rb")), CHUNK)


def open_stream(path: str) -> Stream:
    """The decompressed bytes of a file. A truncated archive raises when its end is reached.

    Raises:
        PrepError: the name says that it is compressed, and its first bytes are not of that kind.
    """
    raw = open_raw(path)
    stated, found = suffixes(path)[1], _compression(raw.peek(_HEAD)[:_HEAD])
    if stated and stated != found and raw.peek(1):
        raw.close()
        is_now = f"but {COMPRESSION_SUFFIXES[found]}" if found else "and not compressed like that"
        raise PrepError(
            f"{path}: named {stated} {is_now}: it is damaged, or must be named by what it is"
        )
    if not found:
        return raw
    stream = Stream(_Decompressed(path, raw, found), CHUNK)
    stream.compressed = True
    return stream


def open_text(path: str) -> Stream:
    """The decompressed bytes of a file of text, behind its byte order mark.

    Raises:
        PrepError: it is not UTF-8 text but of a kind that is known by its first bytes.
    """
    stream = open_stream(path)
    try:
        head = stream.peek(_HEAD)[:_HEAD]
        kind = kind_of(head)
        if kind is not None:
            name, remedy = kind
            raise PrepError(f"{path}: {name}, not text; {remedy}")
        if head.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
    except BaseException:
        stream.close()
        raise
    return stream


def kind_of(head: bytes) -> tuple[str, str] | None:
    """What a file is that begins with `head` and is not UTF-8 text, and the remedy."""
    for begin, name, remedy in _KINDS:
        if head.startswith(begin):
            return name, remedy
    if head[_TAR_MARK] == b"ustar":
        return "a tar archive", "unpack it by `tar -xf`"
    # Without a byte order mark UTF-16 shows by its zeros, every other byte of most languages.
    even, odd = head[0::2], head[1::2]
    for zeros, letters, order in ((odd, even, "LE"), (even, odd, "BE")):
        if len(zeros) >= 4 and zeros.count(0) > 0.4 * len(zeros) and letters.count(0) <= 2:
            return "UTF-16 text", _ICONV.format(f"UTF-16{order}")
    return None


def _compression(head: bytes) -> str:
    """The suffix of the compression that a file begins like; empty if it is not compressed."""
    return next((suffix for suffix, begin in _COMPRESSIONS.items() if begin.match(head)), "")


class _RemoteFile(io.RawIOBase):
    """A file of fsspec under a buffer: its own `readline` is slow, its errors are of any kind."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        self._path, self._file = path, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with errors_of(self._path):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        with errors_of(self._path):
            data = self._file.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Decompressed(io.RawIOBase):
    """The decompressed frames (members, streams) of `raw`, which is closed together with this.

    The libraries' own file objects take a truncated frame, or a damaged one behind a sound one, for
    the end of the file: documents would be lost without a word.
    """

    def __init__(self, path: str, raw: Stream, compression: str) -> None:
        self._path, self._raw = path, raw
        self._name = COMPRESSION_SUFFIXES[compression]
        self._new_frame = _DECOMPRESSORS[compression]
        self._frame: Any = None  # the libraries' decompressors are alike, but have no common class
        self._input = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while not self._ready:
            if not self._input and getattr(self._frame, "needs_input", True):
                self._input = self._raw.read(_STEP)
                if not self._input and self._frame is not None:
                    raise PrepError(f"{self._path}: ends inside a {self._name} frame: truncated")
                if not self._input:
                    return 0
            self._ready = memoryview(self._step())
        count = min(len(view), len(self._ready))
        view[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _step(self) -> bytes:
        """What some more of the input stands for."""
        if self._frame is None:
            self._input = self._input.lstrip(b"\0")  # gzip and xz may be padded
            if not self._input:
                return b""
            self._frame = self._new_frame()
        frame = self._frame
        bounds = () if self._name == "zstd" else (CHUNK,)
        data: bytes = frame.decompress(self._input, *bounds)
        if frame.eof:
            self._input, self._frame = frame.unused_data, None
        else:
            self._input = getattr(frame, "unconsumed_tail", b"")
        return data

    def close(self) -> None:
        self._raw.close()
        super().close()


_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(_GZIP),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj(),
    ".xz": lzma.LZMADecompressor,
    ".bz2": bz2.BZ2Decompressor,
}
