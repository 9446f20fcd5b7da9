"""Start the workers of a run on this machine and return the run's own exit code.

    python -m pretrain launch run.yaml --nproc 2 [--section.key value ...]

checks the config first (exit 2 before any process starts), then starts N processes of
`python -m pretrain train run.yaml ...` with the same environment variables that torchrun sets, so
`train` works under either. Why not torchrun itself, measured with torch 2.13:

- every failure becomes exit code 1, a worker's 75 (resumable) and 2 (bad input) included;
- the first worker to exit 75 makes the agent send SIGTERM to the others, a second Ctrl-C reaches
  the workers as SIGTERM, never as SIGINT, and each stop ends in the agent's own traceback;
- SIGUSR1 kills the agent and orphans its workers (it handles TERM, INT, HUP and QUIT only).

torchrun adds rendezvous over nodes and elastic restarts, which one machine does not need.

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
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from pretrain.config import RunConfig, check_world
from pretrain.processes.devices import check_gpus
from pretrain.processes.keeper import Keeper
from pretrain.run_folder import LOGS_FOLDER, checkpoints_of, life_logs
from pretrain.supervision.lease import newest_life, next_life
from pretrain.supervision.watchdog import last_phases
from xlstm_io.errors import ConfigError, ExitCode, MachineFailed, is_machine_failure
from xlstm_io.remote import is_remote
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
TAIL_LINES = 30
# What ends a worker from outside: the kernel out of memory, a failing page, a person, a scheduler.
KILLS = (signal.SIGKILL, signal.SIGBUS, *STOP_SIGNALS)


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


def _wait(workers: Workers) -> None:
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


def _explain(rank: int, workers: Workers) -> None:
    """Print how a rank ended, and its output unless the terminal has it already."""
    code, log = workers.codes[rank], workers.logs[rank]
    ended = f"rank {rank} ended with exit code {code}"
    if code < 0:
        ended = f"rank {rank} was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            ended += " (often the machine ran out of memory; a smaller data.micro_batch helps)"
    if log is None:
        if code < 0:
            print(ended, file=sys.stderr)
        return
    if 0 in workers.own and workers.codes[0] == code == ExitCode.BAD_INPUT:
        return  # rank 0 has printed the same message
    lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    if 0 in workers.own and workers.codes[0] == code:
        # Most likely the same error everywhere: one line is enough to tell if it is not.
        last = lines[-1:] or ["(no output)"]
        print(f"{ended}: {last[0]}\n(all of it: {log})", file=sys.stderr)
        return
    print(f"{ended}; its output ({log}) {'ends:' if lines else 'is empty'}", file=sys.stderr)
    for line in lines[-TAIL_LINES:]:
        print(f"[rank {rank}] {line}", file=sys.stderr)


def _cause(workers: Workers) -> tuple[int, ExitCode]:
    """The rank that the others followed, and what its end means for the run."""
    codes, failed = workers.codes, workers.failed
    # A worker says 2 only on purpose. A kill from outside, or a bug, makes the others lose it, and
    # they say 70 then, or 1 where they do not understand what happened to them.
    for wanted, meaning in (
        (lambda code: code == ExitCode.BAD_INPUT, ExitCode.BAD_INPUT),
        (lambda code: -code in KILLS, ExitCode.MACHINE_FAILED),
        (lambda code: code != ExitCode.MACHINE_FAILED, ExitCode.BUG),
        (lambda code: True, ExitCode.MACHINE_FAILED),
    ):
        found = [rank for rank in failed if wanted(codes[rank])]
        if found:
            return found[0], meaning
    raise AssertionError("no worker has failed")


def _exit_code(workers: Workers, phases: Path) -> int:
    """The run's exit code from those of its workers; explains a failure on stderr."""
    if workers.interrupted:
        return ExitCode.SECOND_INTERRUPT
    failed = workers.failed
    codes = {workers.codes[rank] for rank in failed}
    for code in (ExitCode.SUPERSEDED, ExitCode.DIVERGED, ExitCode.REFUTED):
        if code in codes:
            return code  # all workers end with it together, rank 0 on this terminal
    if ExitCode.HANG in codes:
        for line in last_phases(phases):
            print(line, file=sys.stderr)
        return ExitCode.HANG
    if failed:
        rank, code = _cause(workers)
        _explain(rank, workers)
        return code
    if workers.terminated:
        late = [rank for rank in workers.codes if rank not in workers.own]
        print(
            f"ranks {late} still ran {STOP_LIMIT_S:.0f} s after another had ended; stopped them",
            file=sys.stderr,
        )
        return ExitCode.BUG
    return ExitCode.DONE if set(workers.codes.values()) == {ExitCode.DONE} else ExitCode.STOPPED


def run_workers(
    command: Sequence[str], nproc: int, log_dir: Path, phases: Path | None = None
) -> int:
    """Run `nproc` copies of a command to their end; only possible in the main thread.

    Args:
        command: what each worker runs.
        nproc: number of workers.
        log_dir: folder for the output of the workers other than rank 0.
        phases: folder where the workers' watchdogs keep their phases; None for `log_dir`.

    Returns:
        0 if all ended with 0; 2 if one ended with 2, for bad input; 75 if they were interrupted
        and can resume; 3 if what they compared differs; 130 after a second Ctrl-C; 70 if one was
        killed from outside or the machine failed; 71 if the run diverged; 74 if it hung; 76 if a
        newer life of it has taken over; 1 for everything else.
    """
    previous: dict[int, Any] = {}
    try:
        # Blocked until the handlers are in place, so that no early signal leaves workers behind.
        with stop_signals_blocked():
            workers = start_workers(command, nproc, log_dir)
            keeper = Keeper([process.pid for process in workers.processes])
            previous = install(workers.handle)
        _wait(workers)
        keeper.release()
    finally:
        restore(previous)
    return _exit_code(workers, phases or log_dir)


def launch(
    config_path: str,
    config: RunConfig,
    nproc: int | None,
    overrides: Sequence[str] = (),
    command: str = "train",
    needs_data: bool = True,
) -> int:
    """Check a run and train it with local workers.

    Args:
        config_path: the run file.
        config: the configuration loaded from it.
        nproc: number of workers; None for as many as one replica of the model needs.
        overrides: the command-line words that the configuration was loaded with, passed on.
        command: what each worker runs, `train` or another that takes the same words.
        needs_data: whether it opens the run's data.

    Returns:
        The run's exit code, see `run_workers`.

    Raises:
        ConfigError: the layout does not fit `nproc`, `nproc` does not fit the GPUs of this machine,
            or the data folder is missing.
    """
    layout = config.layout
    if nproc is None:
        nproc = layout.tensor * layout.pipeline * layout.context
    check_world(config, nproc)
    check_gpus(nproc)
    for key, path in config.data.folders if needs_data else ():
        if not is_remote(path) and not Path(path).is_dir():
            raise ConfigError(
                f"{key}={path!r} is not a folder; build one with python -m data_prep build, or "
                "give another"
            )
    words = [sys.executable, "-m", "pretrain", command, config_path, *overrides]
    folder = Path(config.run.dir)
    try:
        life = next_life(folder, checkpoints_of(config))  # the number that rank 0 will take
    except OSError:  # which rank 0 will say
        life = newest_life(folder) + 1
    return run_workers(words, nproc, life_logs(folder, life), folder / LOGS_FOLDER)
