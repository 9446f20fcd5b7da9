"""What reaches the terminal: text without control characters, counts, and an end of reading.

Names in files that others made (keys of JSON, members of archives, fields of tables) reach
messages. A terminal would obey an escape code in them.
"""

import logging
import os
import reprlib
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from xlstm_io.errors import ExitCode
from xlstm_io.remote import masked


def printable(text: str) -> str:
    """The text with its control characters spelled out as Python does; line ends and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _spelled(c) for c in text)


def one_line(text: object) -> str:
    """A name for use inside of a message: printable, and with its line ends spelled out too."""
    return "".join(c if c.isprintable() else _spelled(c) for c in str(text))


def shortened(value: object) -> str:
    """A value as Python writes it, cut where it is long: for values of files in messages."""
    text = _shortener.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = 120
_shortener.maxlong = 30
_shortener.maxlevel = 2


def _spelled(character: str) -> str:
    return repr(character)[1:-1]


def clean(text: str) -> str:
    """What may be shown: printable, and no credentials in URLs."""
    return printable(masked(text))


class CleanFormatter(logging.Formatter):
    """Messages of a log as `clean` text."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return clean(super().format(record))


def say(text: str) -> None:
    """Print text on stdout, at once."""
    print(clean(text), flush=True)


def tell(text: str) -> None:
    """Print text on stderr, at once. A terminal that is gone does not matter."""
    with suppress(OSError):
        print(clean(text), file=sys.stderr, flush=True)


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 shard`, `2,000 shards`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def size_of_model(parameters: int) -> str:
    """`4.08 M`, `6.87 B`: as people call a model by its number of parameters."""
    billions = parameters >= 1e9
    return f"{parameters / (1e9 if billions else 1e6):.2f} {'B' if billions else 'M'}"


def reopen_closed_streams() -> None:
    """Give a process whose input, output or errors were closed (`2>&-`) an empty one.

    Its first open files would get the numbers 0 to 2 otherwise, and whatever a library prints would
    go into them, such as a checkpoint.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            mode = "r" if number == 0 else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))


def until_nobody_reads(command: Callable[[], int]) -> int:
    """Run a command, and end it where whoever reads its output has ended, as `| head` does.

    Warnings of the log, which may quote names of foreign files, are printed as `clean` text.

    Args:
        command: prints, and returns an exit code.

    Returns:
        The command's exit code, or `ExitCode.NOBODY_READS`.
    """
    reopen_closed_streams()
    if logging.lastResort is not None:  # prints what no handler takes
        logging.lastResort.setFormatter(CleanFormatter())
    try:
        code = command()
        sys.stdout.flush()
    except BrokenPipeError:
        left = [stream for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream)]
        if not left:
            raise  # another pipe
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in left:  # Python would complain again about what it still holds back
            os.dup2(nowhere, stream.fileno())
        return ExitCode.NOBODY_READS
    return code


def _has_no_reader(stream: TextIO) -> bool:
    poll = select.poll()
    try:
        poll.register(stream.fileno(), select.POLLOUT)
    except (OSError, ValueError):  # not a file, or closed
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))
