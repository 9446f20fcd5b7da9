"""The process that has imported everything: `python -m tests.warm_python.server SOCKET PYTHON`.

It listens on SOCKET; PYTHON is the program that stands in for `sys.executable` in its commands.
Each connection is a request for one command: its words, its environment and its three standard
files. The server forks, and the fork becomes the command. The server answers with the process id,
and with the exit code when the command has ended. A command whose client has gone is killed, and so
is every command when the standard input of the server ends.
"""

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import random
import runpy
import selectors
import signal
import socket
import sys
import threading

#: What the commands import. DeepSpeed is not among them: a run without it must not find it loaded.
MODULES = (
    "data_prep.cli",
    "matplotlib.figure",
    "pretrain.cli",
    "pretrain.commands.before_run.check",
    "pretrain.commands.run.demo",
    "pretrain.commands.after_run.evaluate",
    "pretrain.commands.after_run.generate",
    "pretrain.commands.run.launch",
    "pretrain.commands.after_run.report",
    "pretrain.self_test.resume",
    "pretrain.commands.after_run.show",
    "pretrain.commands.run.train",
    "torch.utils.tensorboard",
    "transformers.models.xlstm",
    "xlstm_mcore.convert.cli",
    "xlstm_mcore.convert.export.to_hf",
    "xlstm_mcore.convert.proof.verify",
)


class Server:
    """Forks a process per connection, and tells each client how its process ended."""

    def __init__(self, path):
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(0, selectors.EVENT_READ, self._end)
        self._running = {}  # pid: (its pidfd, its client's connection)
        self._ended = False

    def serve(self):
        """Answer requests. Returns None when the input has ended, in a fork its request."""
        while not self._ended:
            for key, _ in self._selector.select():
                request = key.data()
                if request is not None:
                    return request
        for pid in list(self._running):
            os.kill(pid, signal.SIGKILL)
        return None

    def _end(self):
        self._ended = not os.read(0, 1)

    def _accept(self):
        connection, _ = self._listener.accept()
        size, files, _, _ = socket.recv_fds(connection, 4, 3)
        if len(files) < 3:  # the client has gone already
            connection.close()
            return None
        request = json.loads(_read(connection, int.from_bytes(size, "little")))
        pid = os.fork()
        if pid == 0:
            connection.close()
            self._close()
            return request, files
        for file in files:
            os.close(file)
        _send(connection, pid)
        process = os.pidfd_open(pid)
        self._running[pid] = process, connection
        self._selector.register(process, selectors.EVENT_READ, lambda: self._finish(pid))
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._abandon(pid))
        return None

    def _abandon(self, pid):
        """The client has gone: nobody waits for this process any more."""
        if pid in self._running:
            self._selector.unregister(self._running[pid][1])
            os.kill(pid, signal.SIGKILL)

    def _finish(self, pid):
        process, connection = self._running.pop(pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._selector.unregister(process)
        os.close(process)
        if connection.fileno() in self._selector.get_map():
            self._selector.unregister(connection)
        _send(connection, code)
        connection.close()

    def _close(self):
        """In a fork: close what belongs to the server."""
        self._selector.close()
        self._listener.close()
        for process, connection in self._running.values():
            os.close(process)
            connection.close()


def _read(connection, size):
    with connection.makefile("rb") as file:
        return file.read(size)


def _send(connection, number):
    with contextlib.suppress(OSError):  # the client may have gone
        connection.sendall(f"{number}\n".encode())


def become(words, environment, cwd, files, executable):
    """Make this fork look like a fresh `python -m NAME`, and run it."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    unbuffered = bool(environment.get("PYTHONUNBUFFERED"))
    for name, number in (("stdout", 1), ("stderr", 2)):
        raw = open(number, "wb", 0 if unbuffered else -1, closefd=False)
        lines = name == "stderr" or os.isatty(number)
        stream = io.TextIOWrapper(
            raw, "utf-8", line_buffering=lines, write_through=unbuffered or lines
        )
        setattr(sys, name, stream)
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    threads = environment.get("OMP_NUM_THREADS")
    if threads and "torch" in sys.modules:  # OpenMP has read the server's
        sys.modules["torch"].set_num_threads(int(threads))
    if words[0] == "-u":  # as torchrun starts its workers
        words = words[1:]
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)
    option, name, *arguments = words
    if option != "-m":
        raise SystemExit(f"warm Python runs python -m NAME only, not {words}")
    sys.executable, sys.path[0] = executable, cwd
    sys.argv = [name, *arguments]
    code = 0
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as leave:
        code = _exit_code(leave)
    except KeyboardInterrupt:  # a fresh Python ends by the signal then
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # Python would now free all that the server has imported, object by object.
    os._exit(code)


def _exit_code(leave):
    """The exit code that a `SystemExit` asks for; a text is printed, as Python does."""
    if leave.code is None or isinstance(leave.code, int):
        return (leave.code or 0) & 0xFF
    print(leave.code, file=sys.stderr)
    return 1


def main(path, executable):
    """Import, listen until the input ends, and be the command that was asked for in each fork."""
    importlib.import_module("xlstm_mcore.megatron.first_import").import_megatron()
    for module in MODULES:
        importlib.import_module(module)
    gc.freeze()  # collections in the forks leave these objects alone
    request = Server(path).serve()
    if request is None:
        os._exit(0)
    asked, files = request
    become(files=files, executable=executable, **asked)


if __name__ == "__main__":
    main(*sys.argv[1:])
