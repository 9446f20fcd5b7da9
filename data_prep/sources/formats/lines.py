"""Lines of a stream, of bounded length."""

from collections.abc import Iterator

from data_prep.sources.streams import Stream


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
