"""The one reading of the signals that ask a command to stop.

`STOP_SIGNALS` are Ctrl-C (SIGINT), `kill` and Slurm's end of a job (SIGTERM), the warnings that
schedulers send before it (SIGUSR1, SIGUSR2), and a terminal that was closed (SIGHUP). A command
that gets one finishes what it must not lose, and ends with `ExitCode.STOPPED`. The same command
then continues.

A signal reaches a process more than once. Ctrl-C at a terminal goes to every process of the
foreground group, launcher and workers alike, and the launcher passes on what it gets; Slurm
signals every process of a step. So a repetition within `REPEAT_WINDOW_S` is the same request.
Only a later SIGINT, a person pressing Ctrl-C again, stops at once. Other repeated signals never do
(Slurm sends SIGTERM twice), because a checkpoint may be under way.

Signals that a parent has ignored stay ignored where `nohup` and the shell's `&` mean them to be.
"""

import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from xlstm_io.errors import ExitCode, Interrupted

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # linux/prctl.h
REPEAT_WINDOW_S = 0.5  # the copies of one Ctrl-C arrive within milliseconds; a second press later
STOPPING = (
    "stopping after this step; a checkpoint will be saved; press Ctrl-C again to stop at once"
)

Handler = Callable[[int, FrameType | None], object]


class RepeatedInterrupt:
    """Tells a person who presses Ctrl-C again from the copies of one Ctrl-C."""

    def __init__(self) -> None:
        self._last: float | None = None

    def again(self, number: int) -> bool:
        """Note a signal; whether it is a second Ctrl-C.

        Each copy moves the window, so that a burst of copies counts once.
        """
        if number != signal.SIGINT:
            return False
        last, self._last = self._last, time.monotonic()
        return last is not None and self._last - last >= REPEAT_WINDOW_S


def install(
    handler: Handler,
    *,
    numbers: Collection[int] = STOP_SIGNALS,
    keep_ignored: Collection[int] = STOP_SIGNALS,
) -> dict[int, Any]:
    """Let `handler` handle the stop signals; only possible in the main thread.

    Args:
        handler: called with the number of the signal and the frame.
        numbers: the signals that it gets.
        keep_ignored: those that stay ignored where the parent has ignored them.

    Returns:
        The previous handlers, for `restore`.
    """
    previous = {}
    for number in numbers:
        ignored = signal.getsignal(number) is signal.SIG_IGN
        if not (ignored and number in keep_ignored):
            previous[number] = signal.signal(number, handler)
    return previous


def restore(previous: dict[int, Any]) -> None:
    """Give the signals back to whoever handled them before `install`."""
    for number, handler in previous.items():
        signal.signal(number, handler)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block the stop signals in this thread; those that arrive wait for the end of the block.

    Processes that are started meanwhile inherit them as blocked, so that their parent alone acts
    on a request to stop. Where the process has other threads, one of them may take a signal at
    once.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def signal_at_parents_death(number: int) -> None:
    """Let the kernel send this process a signal when its parent ends (Linux; elsewhere nothing).

    Not for what a shell may start in the background: there the parent's end means nothing. A
    process that this one starts does not inherit it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


@contextmanager
def stop_signals_raise() -> Iterator[None]:
    """Within the block the stop signals raise `Interrupted`, and Ctrl-C KeyboardInterrupt.

    For commands whose work can be cut anywhere, because what is finished is on the disk.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    numbers = [number for number in STOP_SIGNALS if number != signal.SIGINT]
    previous = install(interrupt, numbers=numbers)
    try:
        yield
    finally:
        restore(previous)


class StopSignal:
    """Turns the stop signals into a flag that the training loop reads.

    Use as a context manager around the loop (the previous handlers come back at the end):

        with StopSignal(announce=rank == 0) as stop:
            while step < steps:
                ...
                if any_rank([stop.requested], device)[0]:
                    save(); return ExitCode.STOPPED

    Args:
        announce: print one line at the first signal; only one rank should.

    Attributes:
        started: when this was made, in seconds of `time.monotonic`.
    """

    def __init__(self, announce: bool = True) -> None:
        self.started = time.monotonic()
        self._heard = False
        self._end = math.inf
        self._announce = announce
        self._interrupts = RepeatedInterrupt()
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived, or the time is over."""
        return self._heard or self._time_is_over

    @property
    def reason(self) -> str:
        """Why a stop is requested, in words for a person."""
        return "on request" if self._heard or not self._time_is_over else "its time is over"

    def end_after(self, seconds: float) -> None:
        """Count as a request to stop so many seconds after this was made; the earliest counts."""
        self._end = min(self._end, self.started + seconds)

    def end_at(self, moment: float) -> None:
        """The same from a moment on, in seconds since 1970."""
        self._end = min(self._end, time.monotonic() + moment - time.time())

    @property
    def _time_is_over(self) -> bool:
        return time.monotonic() >= self._end

    def __enter__(self) -> "StopSignal":
        # Ranks are started in the background, where a shell has SIGINT ignored.
        self._previous = install(self._handle, keep_ignored=(signal.SIGHUP,))
        return self

    def __exit__(self, *exc_info: object) -> None:
        restore(self._previous)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._interrupts.again(number):
            # Not sys.exit: that would run cleanup that may wait for other ranks.
            os._exit(ExitCode.SECOND_INTERRUPT)
        if not self._heard:
            self._heard = True
            if self._announce:
                # os.write, because a print in a handler may re-enter a half-done print.
                with suppress(OSError):  # a terminal that is gone
                    os.write(sys.stderr.fileno(), f"\n{STOPPING}\n".encode())
