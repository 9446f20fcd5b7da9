"""Starts a command in the server, and waits for it: as a class, and as a program named `python`.

The program stands in for `sys.executable`, in the forked commands too, so that the workers that
they start are forks as well. It imports little, since each command pays for it.
"""

import json
import os
import select
import signal
import socket
import sys

#: Passed on by the program. SIGKILL needs no passing on: the server kills a command whose client
#: is gone.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class WarmProcess:
    """A command that runs in a fork of the server.

    Args:
        server: path of the server's socket.
        words: what follows the executable: `-m NAME [ARGUMENT ...]`.
        environment: all its variables; those of this process if None.
        output: a file descriptor for its stdout and stderr; those of this process if None.
        cwd: where it runs; here if None.
    """

    def __init__(self, server, words, environment=None, output=None, cwd=None):
        request = {
            "words": [str(word) for word in words],
            "environment": dict(os.environ if environment is None else environment),
            "cwd": str(cwd or os.getcwd()),
        }
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(server))
        files = [0, 1, 2] if output is None else [0, output, output]
        payload = json.dumps(request).encode()
        socket.send_fds(self._connection, [len(payload).to_bytes(4, "little")], files)
        self._connection.sendall(payload)
        self._answers = self._connection.makefile("r")
        self.pid = int(self._answers.readline())
        self.returncode = None

    def wait(self, timeout=None):
        """Its exit code (negative: the signal that killed it). TimeoutError after `timeout` s."""
        if self.returncode is None:
            # Not `select`, which takes no file number above 1023.
            waiting = select.poll()
            waiting.register(self._connection, select.POLLIN)
            if not waiting.poll(None if timeout is None else 1000 * timeout):
                raise TimeoutError(f"the command still runs after {timeout} s")
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._connection.close()
        return self.returncode

    def poll(self):
        """Its exit code, or None while it runs."""
        try:
            return self.wait(0)
        except TimeoutError:
            return None

    def send_signal(self, number):
        """Send it a signal if it still runs."""
        if self.returncode is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                pass  # it has ended, and nobody has asked for its exit code yet


def main():
    """Run a command and end as it does; the arguments are the server's socket and the words."""
    server, *words = sys.argv[1:]
    process = WarmProcess(server, words)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: process.send_signal(number))
    code = process.wait()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
