"""Whole training runs of several processes, cheap enough to be killed by the dozen.

Each rank is a fork of the warm Python (tests/warm_python) and trains from whatever its run folder
holds: `python -m tests.dist.training_runs '{...}'`.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIG_DFL, SIGTERM, getsignal
from typing import Any

from pretrain.checkpoint import find_latest
from pretrain.processes.workers import free_port
from pretrain.watching.metrics import read_metrics
from tests.warm_python.client import WarmProcess
from tests.warm_python.start import ROOT, WarmPython
from xlstm_io.checkpoint.manifest import METADATA_NAME


def tiny_run(folder: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """Values of a run that takes milliseconds per step; ``changes``: section__key=value."""
    raw: dict[str, Any] = {
        "run": {"dir": str(folder), "steps": 24, "seed": 1},
        "model": {"pattern": "M", "hidden_size": 32, "num_heads": 2, "vocab_size": 384},
        "data": {"path": str(data), "seq_len": 16, "global_batch": 4, "micro_batch": 2},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"interval": 2, "keep": 2},
        "evaluation": {"interval": 8, "max_batches": 1},
        "logging": {"interval": 1, "tensorboard": False},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        raw.setdefault(section, {})[name] = value
    return raw


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`; none before there is one."""
    path = folder / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def results(folder: Path) -> tuple[dict[int, tuple[float, float]], dict[str, list]]:
    """Losses and gradient norms of all steps, and the hashes of the final checkpoint's blocks."""
    records = log_of(folder)
    log = {one["step"]: (one["loss"], one["grad_norm"]) for one in records if "loss" in one}
    newest = find_latest(folder)
    assert newest is not None, f"{folder} has no checkpoint"
    blocks = json.loads((newest / METADATA_NAME).read_bytes())["tensors"]
    return log, {name: sorted((r[0], r[1], r[4]) for r in rows) for name, rows in blocks.items()}


@dataclass(frozen=True)
class Signal:
    """A signal that a rank sends itself.

    Attributes:
        number: of the signal.
        batch: at this batch of evaluation; None for a time.
        seconds: so long after its start, or after it hears the signal.
    """

    number: int
    batch: int | None = None
    seconds: float = 0.0


class TrainingRun:
    """The processes of one attempt at a run.

    Args:
        python: where the processes come from.
        raw: the configuration's values.
        ranks: how many processes.
        log: the file to which all of them write.
        die: (rank, number): kill this rank at that write to a checkpoint's file or folder.
        signals: what this rank does to itself, by rank.
    """

    def __init__(
        self,
        python: WarmPython,
        raw: dict[str, Any],
        ranks: int,
        log: Path,
        die: tuple[int, int] | None = None,
        signals: dict[int, "Signal"] | None = None,
    ):
        port = free_port()
        self.processes = []
        with open(log, "ab") as output:
            for rank in range(ranks):
                die_at = die[1] if die is not None and die[0] == rank else None
                environment = os.environ | {
                    "OMP_NUM_THREADS": "1",
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
                own = (signals or {}).get(rank)
                words = [raw, die_at, None if own is None else asdict(own)]
                words = ["-m", "tests.dist.training_runs", json.dumps(words)]
                self.processes.append(
                    WarmProcess(python.server, words, environment, output.fileno(), ROOT)
                )

    @property
    def running(self) -> bool:
        """Whether all ranks are alive."""
        return all(process.poll() is None for process in self.processes)

    def wait(self, limit: float) -> list[int | None]:
        """Exit codes (negative: the signal; None: still running) after `limit` seconds at most.

        When one rank was killed, the others get two seconds to notice.
        """
        end = time.monotonic() + limit
        while time.monotonic() < end and any(p.poll() is None for p in self.processes):
            if any(p.poll() not in (None, 0, 75) for p in self.processes):
                end = min(end, time.monotonic() + 2)
            time.sleep(0.005)
        return [process.poll() for process in self.processes]

    def kill(self, rng: random.Random) -> None:
        """SIGKILL to all that still run, in random order and a few milliseconds apart."""
        for process in rng.sample(self.processes, len(self.processes)):
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                time.sleep(rng.choice([0.0, 0.0, 0.01]))
        for process in self.processes:
            process.wait(60)


def _die_at_flush(number: int) -> None:
    """Each file and folder of a checkpoint is flushed; die before or after the n-th of these."""
    from xlstm_io import storage

    real, count = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    storage.os.fsync = fsync


def _send(signal: Signal) -> None:
    from pretrain.data import ValidLoader

    def send() -> None:
        os.kill(os.getpid(), signal.number)

    def send_in_time() -> None:
        # A process that hears nothing yet is ended by the first signal, as any program is.
        while signal.number == SIGTERM and getsignal(SIGTERM) is SIG_DFL:
            time.sleep(0.001)
        time.sleep(signal.seconds)
        send()

    if signal.batch is None:
        threading.Thread(target=send_in_time, daemon=True).start()
        return
    real, count = ValidLoader.__iter__, 0

    def iterate(self: ValidLoader) -> Iterator[Any]:
        nonlocal count
        for batch in real(self):
            count += 1
            if count == signal.batch:
                send()
            yield batch

    ValidLoader.__iter__ = iterate


def _main(words: str) -> int:
    """`python -m pretrain train`, whose exit code says how a life ended."""
    from pretrain.cli import run

    raw, die_at, own = json.loads(words)
    if die_at is not None:
        _die_at_flush(die_at)
    if own is not None:
        _send(Signal(**own))
    run_file = Path(f"{raw['run']['dir']}.rank_{os.environ['RANK']}.yaml")
    run_file.write_text(json.dumps(raw))
    return run(["train", str(run_file)])


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
