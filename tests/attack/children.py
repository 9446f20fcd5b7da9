"""Tries in forked children of this process, limited in time and memory.

A fork of a process that has imported torch costs more than most tries, so they share a child for
as long as it lives: one that a try has killed, or that is late, is replaced.
"""

import faulthandler
import json
import os
import resource
import select
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from xlstm_io.errors import UserError

SECONDS = 20
MEMORY = 2 << 30  # bytes beyond those that the child has when a try begins

READ, REFUSED, CRASHED = "read", "refused", "crashed"


@dataclass(frozen=True)
class Outcome:
    """How a try ended.

    Attributes:
        kind: READ, REFUSED (by a UserError), or CRASHED: everything else.
        message: of the error; empty where there is none.
    """

    kind: str
    message: str = ""


def attempt(read: Callable[[], object], seconds: float = SECONDS) -> Outcome:
    """Call `read` in a child of its own, for at most that time and MEMORY."""
    return next(attempts(lambda number: read(), 1, seconds))


def attempts(
    read: Callable[[int], object], count: int, seconds: float = SECONDS
) -> Iterator[Outcome]:
    """Call `read` with 0, 1, ..., `count` - 1, each for at most that time and MEMORY.

    Nothing that a try leaves in memory may change the next one. A file that a try damages has to be
    a new one, as an earlier one may be mapped still.
    """
    number = 0
    while number < count:
        for outcome in _tries_of_a_child(read, range(number, count), seconds):
            yield outcome
            number += 1


def _tries_of_a_child(
    read: Callable[[int], object], numbers: range, seconds: float
) -> Iterator[Outcome]:
    """The outcomes of a child's tries; the last one may be the end of the child."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiving)
        _run(read, numbers, sending)
    os.close(sending)
    told, late = b"", False
    waiting = select.poll()  # `select` takes no file number above 1023
    waiting.register(receiving, select.POLLIN)
    try:
        for _ in numbers:
            while b"\n" not in told:
                late = not waiting.poll(1000 * seconds)
                data = b"" if late else os.read(receiving, 1 << 16)
                if not data:
                    break
                told += data
            line, ended, told = told.partition(b"\n")
            if not ended:
                child, dead = 0, child
                yield Outcome(CRASHED, _end_of(dead, late, seconds))
                return
            yield Outcome(*json.loads(line))
    finally:
        os.close(receiving)
        if child:
            _end_of(child, True, seconds)


def _end_of(child: int, kill: bool, seconds: float) -> str:
    """How a child ended, which is waited for."""
    if kill:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if kill:
        return f"still running after {seconds} s"
    if os.WIFSIGNALED(status):
        return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with exit code {os.WEXITSTATUS(status)}"


def _run(read: Callable[[int], object], numbers: range, sending: int) -> None:
    try:
        os.setpgid(0, 0)
        faulthandler.disable()  # a crash is told by its signal
        for standard in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), standard)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in numbers:
            with open("/proc/self/statm") as file:
                now = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, resource.RLIM_INFINITY))
            os.write(sending, json.dumps(_outcome(read, number)).encode() + b"\n")
    finally:
        os._exit(0)


def _outcome(read: Callable[[int], object], number: int) -> tuple[str, str]:
    try:
        read(number)
    except UserError as error:
        return REFUSED, str(error).encode("utf-8", "backslashreplace").decode()
    except BaseException:
        return CRASHED, traceback.format_exc()
    return READ, ""
