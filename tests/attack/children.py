"""One try in a forked child of this process, limited in time and memory."""

import faulthandler
import os
import resource
import select
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from xlstm_io.errors import UserError

SECONDS = 20
MEMORY = 2 << 30  # bytes beyond those of this process

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
    """Call `read` in a child of at most that time and MEMORY."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiving)
        _run(read, sending)
    os.close(sending)
    parts, ended = [], False
    waiting = select.poll()  # `select` takes no file number above 1023
    waiting.register(receiving, select.POLLIN)
    while waiting.poll(1000 * seconds):
        data = os.read(receiving, 1 << 16)
        if not data:
            ended = True
            break
        parts.append(data)
    os.close(receiving)
    if not ended:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not ended:
        return Outcome(CRASHED, f"still running after {seconds} s")
    if os.WIFSIGNALED(status):
        return Outcome(CRASHED, f"ended by {signal.Signals(os.WTERMSIG(status)).name}")
    kind, _, message = b"".join(parts).decode("utf-8", "backslashreplace").partition("\n")
    return Outcome(kind or CRASHED, message)


def _run(read: Callable[[], object], sending: int) -> None:
    try:
        os.setpgid(0, 0)
        faulthandler.disable()  # a crash is told by its signal
        for standard in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), standard)
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        kind, message = _outcome(read)
        os.write(sending, f"{kind}\n{message}".encode("utf-8", "backslashreplace"))
    finally:
        os._exit(0)


def _outcome(read: Callable[[], object]) -> tuple[str, str]:
    try:
        read()
    except UserError as error:
        return REFUSED, str(error)
    except BaseException:
        return CRASHED, traceback.format_exc()
    return READ, ""
