"""Ends the workers of a launcher that was killed, also those that stand still.

    python -m pretrain.processes.keeper PID ...

When the launcher dies, the kernel asks its workers to stop. One that is stopped itself (SIGSTOP, a
debugger) does not hear that, the others wait for it, and nobody is left to end them. So a process
that does nothing else waits for the launcher's end. It lets every worker run again, which then
hears the request, and after the launcher's own limit it ends what is still there.

The launcher holds the other end of the standard input: a line there says that all is well.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from xlstm_io.holder import started

LIMIT_S = 600.0  # longer than a checkpoint takes
POLL_S = 0.5


class Keeper:
    """The process that outlives its launcher; `release` it when the workers have ended.

    Args:
        pids: of the workers.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pretrain.processes.keeper", *map(str, pids)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what ends the launcher's group does not end this one
        )

    def release(self) -> None:
        """All workers have ended."""
        with suppress(OSError):
            self._process.communicate(b"well\n")


def main(words: Sequence[str]) -> int:
    """Wait for the launcher's end, and then for that of its workers."""
    workers = {pid: started(pid) for pid in map(int, words)}
    if sys.stdin.read():
        return 0

    def left() -> list[int]:
        return [pid for pid, since in workers.items() if since and started(pid) == since]

    def send(number: int) -> None:
        for pid in left():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    send(signal.SIGCONT)
    end = time.monotonic() + LIMIT_S
    while left() and time.monotonic() < end:
        time.sleep(POLL_S)
    send(signal.SIGKILL)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
