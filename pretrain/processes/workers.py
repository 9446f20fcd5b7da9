"""The workers of a run on this machine: started as torchrun would, signalled, and waited for.

Signals. Ctrl-C reaches launcher and workers from the terminal; `kill` and a batch system may reach
the launcher only. The launcher passes on whatever it gets, and a worker takes a repetition within
half a second as the same request (`xlstm_io.signals`). It then waits for the workers to save. A
second Ctrl-C ends everything within seconds, even a worker that sits in a collective and cannot
run its Python handler. A worker that was asked alone, before the ranks had met, could tell nobody:
the launcher asks the others then.

Failures. When a worker fails, the others get a few seconds to end by themselves (they lose their
peer and usually do), then SIGTERM, then SIGKILL. If the launcher itself is killed, the kernel
sends the workers SIGTERM (Linux), and `pretrain.processes.keeper` sees to those that stand still.
"""

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from pretrain.processes.keeper import Keeper
from xlstm_io.errors import ConfigError, ExitCode, MachineFailed, is_machine_failure
from xlstm_io.signals import (
    STOP_SIGNALS,
    RepeatedInterrupt,
    install,
    restore,
    signal_at_parents_death,
    stop_signals_blocked,
)

POLL_S = 0.05
FIRST_PORT = 20_000  # of those that rank 0 may listen on; few services have one beyond
PORT_TRIES = 100
FAILURE_GRACE_S = 5.0  # for the other workers to notice that one is gone and say why they end
TERMINATE_GRACE_S = 3.0  # between SIGTERM and SIGKILL after a failure
INTERRUPT_GRACE_S = 3.0  # between the second Ctrl-C and SIGKILL
FOLLOW_S = 10.0  # for the others to end after a worker that was asked to stop has ended
STOP_LIMIT_S = 600.0  # after the first worker ended well; longer than a checkpoint takes


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on right now.

    It lies below those that the system gives to whoever names none: rank 0 listens on it seconds
    later, and another process that opens connections meanwhile, as gloo does by the dozen, must not
    be given the same one.
    """
    below = range(FIRST_PORT, _first_given_port())
    for port in random.Random().sample(below, min(len(below), PORT_TRIES)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _first_given_port() -> int:
    """The first port that the system gives out by itself; Linux's default where it is silent."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        return 32768


def worker_environment(rank: int, nproc: int, port: int) -> dict[str, str]:
    """The environment of one worker: torchrun's variables, and a fair share of the cores."""
    environment = dict(os.environ)
    environment.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(nproc),
        LOCAL_WORLD_SIZE=str(nproc),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    # All peers are on this machine: no need for its name to resolve or its network to be up.
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if rank:
        environment["PYTHONUNBUFFERED"] = "1"  # its log must be whole even if it is killed
    return environment


def _die_with_parent(parent: int) -> None:
    """In the child, before exec: get SIGTERM when the launcher is gone (Linux only)."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the mask would survive exec
    signal_at_parents_death(signal.SIGTERM)
    if os.getppid() != parent:  # it died before the request above
        os._exit(ExitCode.STOPPED)


@dataclass
class Workers:
    """The running workers and what has happened to them so far.

    Attributes:
        processes: the workers by rank.
        logs: the files that they write to; None for rank 0.
        codes: exit codes by rank in the order of ending (negative: killed by that signal).
        own: ranks that ended before the launcher killed anything.
        stop_requested: the launcher was asked to stop.
        interrupted: it was asked twice by Ctrl-C.
        terminated: the launcher has ended workers itself.
    """

    processes: list[subprocess.Popen]
    logs: list[Path | None]
    codes: dict[int, int] = field(default_factory=dict)
    own: set[int] = field(default_factory=set)
    stop_requested: bool = False
    interrupted: bool = False
    terminated: bool = False
    _interrupts: RepeatedInterrupt = field(default_factory=RepeatedInterrupt)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler of the launcher: note the request and pass it on."""
        if self._interrupts.again(number):
            self.interrupted = True
        self.stop_requested = True
        self.send(number)

    def send(self, number: int) -> None:
        """Send a signal to every worker that still runs."""
        for process in self.processes:
            if process.returncode is None:
                process.send_signal(number)

    def poll(self) -> None:
        """Collect the workers that have ended."""
        for rank, process in enumerate(self.processes):
            if rank not in self.codes and process.poll() is not None:
                self.codes[rank] = process.returncode
                if not self.terminated:
                    self.own.add(rank)

    @property
    def failed(self) -> list[int]:
        """Ranks that ended with something else than 0 or 75, by themselves, in that order."""
        asked = (ExitCode.DONE, ExitCode.STOPPED)
        if self.stop_requested:
            # Asked before its handlers were there (imports take seconds): nothing was lost.
            asked += (*(-number for number in STOP_SIGNALS), ExitCode.SECOND_INTERRUPT)
        return [r for r, code in self.codes.items() if code not in asked and r in self.own]


def start_workers(command: Sequence[str], nproc: int, log_dir: Path) -> Workers:
    """Start `nproc` copies of a command, one per rank.

    Args:
        command: what each worker runs.
        nproc: number of workers.
        log_dir: rank N writes its output to `rank_N.log` in here; rank 0 has this process's.

    Raises:
        ConfigError: that folder cannot be written.
        MachineFailed: its disk is full.
    """
    port, parent = free_port(), os.getpid()
    workers = Workers([], [])
    for rank in range(nproc):
        path = log_dir / f"rank_{rank}.log" if rank else None
        output: Any = None
        if path is not None:
            try:
                log_dir.mkdir(parents=True, exist_ok=True)
                output = open(path, "wb")
            except OSError as error:
                workers.send(signal.SIGKILL)
                if is_machine_failure(error):
                    raise MachineFailed(f"rank {rank}: {error}") from error
                raise ConfigError(
                    f"{path} cannot be written ({error.strerror}); choose another run.dir"
                ) from error
        workers.processes.append(
            subprocess.Popen(
                command,
                env=worker_environment(rank, nproc, port),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                preexec_fn=lambda: _die_with_parent(parent),
            )
        )
        workers.logs.append(path)
        if output is not None:
            output.close()
    return workers


def wait(workers: Workers) -> None:
    """Wait until all workers have ended; end those that outlive a failure or an interrupt."""
    first_exit = failure = interrupt = terminate = None
    while len(workers.codes) < len(workers.processes):
        time.sleep(POLL_S)
        workers.poll()
        now = time.monotonic()
        if workers.codes and first_exit is None:
            first_exit = now
        if workers.failed and failure is None:
            failure = now
        if workers.interrupted and interrupt is None:
            interrupt = now
        asked_alone = not workers.stop_requested and ExitCode.STOPPED in workers.codes.values()
        if asked_alone and now - first_exit > FOLLOW_S:
            workers.stop_requested = True
            workers.send(signal.SIGTERM)
        if terminate is None and (
            (failure is not None and now - failure > FAILURE_GRACE_S)
            or (first_exit is not None and now - first_exit > STOP_LIMIT_S)
        ):
            terminate, workers.terminated = now, True
            workers.send(signal.SIGTERM)
        if (terminate is not None and now - terminate > TERMINATE_GRACE_S) or (
            interrupt is not None and now - interrupt > INTERRUPT_GRACE_S
        ):
            workers.terminated = True
            workers.send(signal.SIGKILL)


def run_to_their_end(command: Sequence[str], nproc: int, log_dir: Path) -> Workers:
    """Run `nproc` copies of a command to their end; only possible in the main thread.

    See `start_workers` for arguments and errors.
    """
    previous: dict[int, Any] = {}
    try:
        # Blocked until the handlers are in place, so that no early signal leaves workers behind.
        with stop_signals_blocked():
            workers = start_workers(command, nproc, log_dir)
            keeper = Keeper([process.pid for process in workers.processes])
            previous = install(workers.handle)
        wait(workers)
        keeper.release()
    finally:
        restore(previous)
    return workers
