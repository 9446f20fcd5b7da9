"""Rank 0's console, kept in a file beside the output of the other ranks.

Whoever started the run may have closed the terminal, or given its output to a scheduler's file. The
other ranks' output goes to files of `pretrain.commands.run.launch`, or to whatever started them.
"""

import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from xlstm_io.errors import MachineFailed, Superseded, UserError


class ConsoleLog:
    """Copies what Python prints into a file, while it is used as a context manager.

    A progress bar draws over itself: of such a line the file gets what stands there in the end. An
    error that ends the block is noted too, because it is printed later. What a library writes
    without Python is missing. A full disk ends the copy and not the run.

    Args:
        path: the file; one that is there is replaced.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._streams: tuple[TextIO, TextIO] = sys.stdout, sys.stderr

    def __enter__(self) -> "ConsoleLog":
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "w", buffering=1, encoding="utf-8", errors="replace")
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (_Copied(stream, self) for stream in self._streams)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        sys.stdout, sys.stderr = self._streams
        if isinstance(error, UserError | MachineFailed | Superseded):
            self.note(f"error: {error}")
        elif isinstance(error, Exception):
            self.note("".join(traceback.format_exception(error)).rstrip("\n"))
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def note(self, line: str) -> None:
        """Add a line to the file."""
        if self._file is not None:
            with suppress(OSError):
                self._file.write(f"{line}\n")


class _Copied:
    """A stream whose finished lines are noted."""

    def __init__(self, stream: TextIO, log: ConsoleLog) -> None:
        self._stream, self._log, self._line = stream, log, ""

    def write(self, text: str) -> int:
        *finished, rest = (self._line + text).split("\n")
        for line in finished:
            self._log.note(line.rpartition("\r")[2])
        self._line = rest.rpartition("\r")[2]
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
