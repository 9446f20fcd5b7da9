"""How a process of a run ends."""

import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from xlstm_io.errors import ExitCode


def end_with(command: Callable[[], int]) -> NoReturn:
    """Run a command and end this process with its exit code.

    A process group that is still there was left by an error that the other ranks may not share. To
    leave Python would destroy it, and that can wait half an hour for a rank that is gone. So the
    process ends at once then, after its last words.

    Args:
        command: returns the exit code; an exception is a bug of ours, with its traceback.
    """
    try:
        code = command()
    except Exception:
        if not _in_a_group():
            raise
        traceback.print_exc()
        code = ExitCode.BUG
    if _in_a_group():
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # a terminal that is gone
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _in_a_group() -> bool:
    """Whether this process belongs to a process group; without importing torch for it."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()
