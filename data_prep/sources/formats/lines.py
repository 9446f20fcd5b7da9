"""Lines of a stream, of bounded length; and reading on where this process stopped before."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np

from data_prep.sources.files import file_fingerprint
from data_prep.sources.streams import Stream

_Record = TypeVar("_Record")


def bounded_lines(stream: Stream, longest: int) -> Iterator[tuple[bytes | None, int]]:
    """(line with its end, bytes) of each line; None for the line where it has more than `longest`.

    Such a line is passed over without being held in memory.
    """
    while line := stream.readline(longest + 1):
        if len(line) <= longest:
            yield line, len(line)
            continue
        size = len(line)
        while line and not line.endswith(b"\n"):
            line = stream.readline(longest + 1)
            size += len(line)
        yield None, size


def chosen(
    records: Iterator[tuple[int, _Record]], wanted: np.ndarray | None
) -> Iterator[tuple[int, _Record]]:
    """Those of the numbered records that are wanted; all where nothing is said.

    Args:
        records: (number, record) in order; none is asked for behind the last wanted one.
        wanted: sorted numbers, at least one; None for all.
    """
    if wanted is None:
        yield from records
        return
    numbers, last = set(wanted.tolist()), int(wanted[-1])
    for number, record in records:
        if number in numbers:
            yield number, record
        if number >= last:
            return


class _Reading(NamedTuple):
    """A reading that has stopped: of which file and kind, at which record, and what follows."""

    key: str
    number: int
    records: Iterator[Any]


_stopped: list[_Reading] = []  # the last one of this process


def numbered_records(
    path: str, kind: str, begin: Callable[[], Iterator[_Record]], first: int
) -> Iterator[tuple[int, _Record]]:
    """(number, record) of a file, from its start or from where this process stopped reading it.

    A compressed file cannot be entered in its middle. The shards of a large one would each read all
    that lies before them, which takes more time than to tokenize them.

    Args:
        path: the file.
        kind: what its records are.
        begin: gives its records from the first one on.
        first: a number; records before it may be left out.
    """
    key = repr((file_fingerprint(path), kind))
    found = _stopped.pop() if _stopped else None
    if found is None or found.key != key or found.number > first:
        found = _Reading(key, 0, begin())
    for number, record in enumerate(found.records, found.number):
        try:
            yield number, record
        except GeneratorExit:
            _stopped[:] = [_Reading(key, number + 1, found.records)]
            raise
