"""Starts and ends the server of a test session."""

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.warm_python import client

ROOT = Path(__file__).parents[2]
LIMIT_S = 240  # for the imports, on a busy machine


@dataclass(frozen=True)
class WarmPython:
    """A running server.

    Attributes:
        executable: a program to call in the place of `sys.executable`, with `-m NAME`.
        server: the server's socket, for `WarmProcess`.
        environment: a folder for `make VENV=...`, whose `bin/python` is the executable.
    """

    executable: Path
    server: Path
    environment: Path


@contextlib.contextmanager
def start():
    """Start the server, and end it and all its commands."""
    with tempfile.TemporaryDirectory(prefix="warm-python-") as folder:  # a socket's path is short
        environment = Path(folder)
        executable = environment / "bin" / "python"
        executable.parent.mkdir()
        path = environment / "server"
        words = shlex.join([sys.executable, "-I", "-S", client.__file__, str(path)])
        executable.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        executable.chmod(0o755)
        (environment / ".installed").touch()  # make has nothing to install
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm_python.server", str(path), str(executable)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches pytest, which then ends the server
        )
        try:
            _wait_until_it_listens(process, path)
            yield WarmPython(executable, path, environment)
        finally:
            process.stdin.close()
            process.wait()


def _wait_until_it_listens(process, path):
    end = time.monotonic() + LIMIT_S
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(os.fspath(path))
            return
        time.sleep(0.05)
    raise AssertionError(f"the server did not come up in {LIMIT_S} s, or ended: {process.poll()}")
