"""Start the workers of a run on this machine and return the run's own exit code.

    python -m pretrain launch run.yaml --nproc 2 [--section.key value ...]

checks the config first (exit 2 before any process starts), then starts N processes of
`python -m pretrain train run.yaml ...` with the same environment variables that torchrun sets, so
`train` works under either. Why not torchrun itself, measured with torch 2.13:

- every failure becomes exit code 1, a worker's 75 (resumable) and 2 (bad input) included;
- the first worker to exit 75 makes the agent send SIGTERM to the others, a second Ctrl-C reaches
  the workers as SIGTERM, never as SIGINT, and each stop ends in the agent's own traceback;
- SIGUSR1 kills the agent and orphans its workers (it handles TERM, INT, HUP and QUIT only).

torchrun adds rendezvous over nodes and elastic restarts, which one machine does not need. How the
workers are signalled and waited for is in `pretrain.processes.workers`. Here is what the run's exit
code is, once all of them have ended.
"""

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pretrain.config import RunConfig, check_world
from pretrain.processes.devices import check_gpus
from pretrain.processes.workers import STOP_LIMIT_S, Workers, run_to_their_end
from pretrain.run_folder import LOGS_FOLDER, checkpoints_of, life_logs
from pretrain.supervision.lease import newest_life, next_life
from pretrain.supervision.watchdog import last_phases
from xlstm_io.errors import ConfigError, ExitCode
from xlstm_io.remote import is_remote
from xlstm_io.signals import STOP_SIGNALS

TAIL_LINES = 30
# What ends a worker from outside: the kernel out of memory, a failing page, a person, a scheduler.
KILLS = (signal.SIGKILL, signal.SIGBUS, *STOP_SIGNALS)


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
    return _exit_code(run_to_their_end(command, nproc, log_dir), phases or log_dir)


def launch(
    config_path: str,
    config: RunConfig,
    nproc: int | None,
    overrides: Sequence[str] = (),
    command: str = "train",
    needs_data: bool = True,
    before: Callable[[], None] = lambda: None,
) -> int:
    """Check a run and train it with local workers.

    Args:
        config_path: the run file.
        config: the configuration loaded from it.
        nproc: number of workers; None for as many as one replica of the model needs.
        overrides: the command-line words that the configuration was loaded with, passed on.
        command: what each worker runs, `train` or another that takes the same words.
        needs_data: whether it opens the run's data.
        before: called when the checks have passed, before the first worker starts.

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
    before()
    words = [sys.executable, "-m", "pretrain", command, config_path, *overrides]
    folder = Path(config.run.dir)
    try:
        life = next_life(folder, checkpoints_of(config))  # the number that rank 0 will take
    except OSError:  # which rank 0 will say
        life = newest_life(folder) + 1
    return run_workers(words, nproc, life_logs(folder, life), folder / LOGS_FOLDER)
