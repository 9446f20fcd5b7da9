"""Whole training runs as forked processes, cheap enough to be killed by the dozen.

Importing torch and megatron-core takes seconds. A fork server imports them once; each life of a run
is a fork of it, one per rank, that trains from whatever its folder holds.
"""

import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pretrain.commands.self_test
import pretrain.trainer
from pretrain.config import config_from_dict
from xlstm_io import storage

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.dist.lives"])


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


def _life(raw: dict, rank: int, ranks: int, port: int, log: str, die_at: int | None) -> None:
    """One rank's life; ``die_at``: kill it at that write to a checkpoint file or folder."""
    os.environ.update(
        OMP_NUM_THREADS="1",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    torch.set_num_threads(1)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if die_at is not None:
        _die_at_flush(die_at)
    try:
        code = pretrain.trainer.main(config_from_dict(raw))
    except Exception:
        import traceback

        traceback.print_exc()
        code = 1
    os._exit(code)


def _die_at_flush(number: int) -> None:
    """Each file and folder of a checkpoint is flushed; die before or after the n-th of these."""
    real, count = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    storage.os.fsync = fsync


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Life:
    """The processes of one attempt at a run."""

    def __init__(self, raw: dict, ranks: int, log: Path, die: tuple[int, int] | None = None):
        port = _free_port()
        self.processes = []
        for rank in range(ranks):
            die_at = die[1] if die is not None and die[0] == rank else None
            process = CONTEXT.Process(target=_life, args=(raw, rank, ranks, port, str(log), die_at))
            process.start()
            self.processes.append(process)

    @property
    def running(self) -> bool:
        """Whether all ranks are alive."""
        return all(process.is_alive() for process in self.processes)

    def wait(self, limit: float) -> list[int | None]:
        """Exit codes (negative: the signal; None: still running) after ``limit`` seconds at most.

        When one rank was killed, the others get two seconds to notice.
        """
        end = time.monotonic() + limit
        while time.monotonic() < end and any(p.is_alive() for p in self.processes):
            if any(p.exitcode not in (None, 0, 75) for p in self.processes):
                end = min(end, time.monotonic() + 2)
            time.sleep(0.005)
        return [p.exitcode for p in self.processes]

    def kill(self, rng: random.Random) -> None:
        """SIGKILL to all that still run, in random order and a few milliseconds apart."""
        for process in rng.sample(self.processes, len(self.processes)):
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                time.sleep(rng.choice([0.0, 0.0, 0.01]))
        for process in self.processes:
            process.join()
