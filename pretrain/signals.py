"""Stopping a run on request: finish the step, save, exit 75.

A signal reaches a worker more than once. Ctrl-C at a terminal goes to every process of the
foreground group, launcher and workers alike, and the launcher passes on what it gets; Slurm
signals every process of a step. So a repetition within `REPEAT_WINDOW_S` is the same request.
Only a later SIGINT, a person pressing Ctrl-C again, stops at once; repeated SIGTERM or SIGUSR1
(Slurm sends TERM twice) never does, because a checkpoint may be under way. SIGHUP, a terminal that
was closed, counts as a request too, unless nohup has it ignored.

Ranks get the signal in different steps. They must agree before one leaves the loop, or the others
would wait for it in the next collective: `any_rank` takes the maximum over all, once per step.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from xlstm_io.errors import ExitCode

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
REPEAT_WINDOW_S = 0.5  # the copies of one Ctrl-C arrive within milliseconds; a second press later
STOPPING = (
    "stopping after this step; a checkpoint will be saved; press Ctrl-C again to stop at once"
)


class StopSignal:
    """Turns SIGINT, SIGTERM, SIGUSR1 and SIGHUP into a flag that the training loop reads.

    Use as a context manager around the loop (the previous handlers come back at the end):

        with StopSignal(announce=rank == 0) as stop:
            while step < steps:
                ...
                if any_rank([stop.requested], device)[0]:
                    save(); return ExitCode.STOPPED

    announce: print one line at the first signal; only one rank should.
    """

    def __init__(self, announce: bool = True):
        self.requested = False
        self._announce = announce
        self._last_sigint: float | None = None
        self._previous: dict[int, Any] = {}

    def install(self) -> "StopSignal":
        """Install the handlers; only possible in the main thread."""
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def __enter__(self) -> "StopSignal":
        return self.install()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            repeated = self._last_sigint is not None
            # Each copy moves the window, so that a burst of copies counts once.
            again = repeated and now - self._last_sigint >= REPEAT_WINDOW_S
            self._last_sigint = now
            if again:
                # Not sys.exit: that would run cleanup that may wait for other ranks.
                os._exit(ExitCode.SECOND_INTERRUPT)
        if not self.requested:
            self.requested = True
            if self._announce:
                # os.write, because a print in a handler may re-enter a half-done print.
                with suppress(OSError):  # a terminal that is gone
                    os.write(sys.stderr.fileno(), f"\n{STOPPING}\n".encode())


def any_rank(flags: Sequence[bool], device: Any = "cpu", group: Any = None) -> list[bool]:
    """For each flag, whether it is set on any rank of `group`; collective, the same everywhere.

    device: where the group's backend wants its tensors. Without an initialised process group the
    answer is this process's own flags.
    """
    import torch.distributed as dist
    from torch import int32, tensor

    if not dist.is_initialized():
        return list(flags)
    values = tensor([int(flag) for flag in flags], dtype=int32, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return [bool(value) for value in values.tolist()]
