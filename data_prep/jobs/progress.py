"""Progress of long jobs: a bar on a terminal, a plain line every few seconds in a log file."""

import sys
import time
from typing import Self

from tqdm import tqdm

from xlstm_io.terminal import say

_LOG_SECONDS = 10.0


class Progress:
    """Counts bytes of text towards a total. Use as a context manager.

    On a terminal a tqdm bar on stderr; otherwise `say` lines with rate and time left.
    """

    def __init__(self, title: str, total_bytes: int):
        self.title, self.total, self.done = title, max(total_bytes, 1), 0
        self._start = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_bytes, desc=title, unit="B", unit_scale=True, leave=False)

    def set(self, done: int) -> None:
        """Report the bytes that are done so far."""
        if self._bar is not None:
            self._bar.update(done - self.done)
        self.done = done
        now = time.monotonic()
        if self._bar is None and now - self._last >= _LOG_SECONDS:
            self._last = now
            rate = done / (now - self._start)
            size = f"{done / 1e6:.1f} MB, {rate / 1e6:.2f} MB/s"
            if 0 < done <= self.total:  # a compressed file holds more text than bytes
                left = (self.total - done) / rate
                size = f"{100 * done / self.total:.0f} % ({size}, {left:.0f} s left)"
            say(f"{self.title}: {size}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()
