"""Runs a parser that may crash in a forked process: a damaged file is then an error like any other.

The libraries that read tables are written in C++ and trust what a file says: a damaged one can end
the process by a signal, or by an exception that no Python code sees. In a process of its own that
ends the reading of one file, with a message that names it.
"""

import faulthandler
import os
import pickle
import resource
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

from xlstm_io.errors import PrepError

_Item = TypeVar("_Item")

_BATCH = 256  # items that cross the pipe together,
_BATCH_BYTES = 1 << 22  # unless they are large: both processes hold them
_ITEMS, _END = "items", "end"


def yield_apart(
    make: Callable[[], Iterator[_Item]], path: str, size: Callable[[_Item], int]
) -> Iterator[_Item]:
    """What `make()` yields, worked out in a forked process.

    Args:
        make: gives picklable items; it runs in the other process.
        path: the file that is read, for messages.
        size: about how many bytes an item takes.

    Raises:
        PrepError: `make` raised one, or its process died.
    """
    receiving, sending = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads. Our threads hold no lock that the parser needs,
        # and pyarrow makes its own anew in a forked process.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(receiving)
        _send(lambda: _batches(make(), size), path, sending)
    os.close(sending)
    finished = False
    try:
        with open(receiving, "rb") as stream:
            while not finished:
                try:
                    kind, value = pickle.load(stream)
                except (EOFError, pickle.UnpicklingError):  # it died
                    break
                if kind == _ITEMS:
                    yield from value
                    continue
                finished = True
                if kind != _END:
                    raise kind(value)
    finally:
        if not finished:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if not finished:
        raise PrepError(f"{path}: {_how_it_ended(status)}")


def _batches(items: Iterator[_Item], size: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    batch, held = list[_Item](), 0
    for item in items:
        batch.append(item)
        held += size(item)
        if len(batch) == _BATCH or held >= _BATCH_BYTES:
            yield batch
            batch, held = [], 0
    yield batch


def _send(make: Callable[[], Iterator[list[_Item]]], path: str, sending: int) -> None:
    """Run `make` and write what it yields to a pipe; does not return."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too; its parent stops it
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # last words of C++; the parent has its own
    try:
        with open(sending, "wb") as stream:
            _write_items(make, path, stream)
    finally:
        os._exit(0)


def _write_items(make: Callable[[], Iterator[list[_Item]]], path: str, stream: BinaryIO) -> None:
    def put(kind: type | str, value: object) -> None:
        pickle.dump((kind, value), stream, pickle.HIGHEST_PROTOCOL)

    try:
        for batch in make():
            put(_ITEMS, batch)
    except PrepError as error:
        put(type(error), str(error))
    except MemoryError:
        put(PrepError, f"{path}: there is too little memory to read it")
    except Exception:  # a bug of ours
        put(RuntimeError, traceback.format_exc())
    else:
        put(_END, None)


def _how_it_ended(status: int) -> str:
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        memory = " or the machine had too little memory" if name in ("SIGKILL", "SIGABRT") else ""
        return (
            f"it is damaged{memory}: its reader was ended by {name}; restore or leave out the file"
        )
    return "it cannot be read: its reader ended without a word; restore or leave out the file"
