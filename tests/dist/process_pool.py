"""A pool of worker processes for distributed tests.

Importing torch and megatron-core takes seconds; a test that started its own processes would spend
its time there. Workers are started once and join a fresh process group for every call. They are
fresh Pythons and not forks of one, so that each has hashes of strings of its own: ranks that walk
through a set in different orders are noticed.
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from pretrain.processes.workers import free_port

TIMEOUT_S = 240
# A gloo group has threads that wake up all the time. DeepSpeed's stage 3 keeps its groups alive
# through C++, so a worker that has collected so many threads is replaced by a fresh one.
MOST_THREADS = 400
# Makes a worker write the stacks of its threads; the commands under test use the other signals.
WHERE = signal.SIGQUIT


class ProcessPool:
    """Up to `size` processes; `pool(n, function, *args)` runs a function on n ranks.

    Args:
        size: The largest number of ranks.
        timeout_s: How long a call may take.
    """

    def __init__(self, size: int, timeout_s: float = TIMEOUT_S):
        self._context = multiprocessing.get_context("spawn")
        self._size, self._timeout_s = size, timeout_s
        self._workers: list[Any] = []

    def __enter__(self) -> "ProcessPool":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop()

    def __call__(self, ranks: int, function: Callable, *args: Any) -> list[Any]:
        """Results by rank; AssertionError with the traceback of the first rank that failed."""
        assert ranks <= self._size
        while len(self._workers) < ranks:
            mine, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            self._workers.append((process, mine))
        port = free_port()
        workers = self._workers[:ranks]
        for rank, (_, pipe) in enumerate(workers):
            pipe.send((rank, ranks, port, function, args))
        results = []
        for rank, (process, pipe) in enumerate(workers):
            if not pipe.poll(self._timeout_s):
                os.kill(process.pid, WHERE)
                time.sleep(1)  # for it to write
                self._stop()
                raise AssertionError(
                    f"rank {rank} of {ranks} did not answer in {self._timeout_s:g} s; where it "
                    f"stood is on stderr; the ranks before it returned {results}"
                )
            try:
                ok, value = pipe.recv()
            except EOFError:
                self._stop()
                raise AssertionError(f"rank {rank} died, exit code {process.exitcode}") from None
            if not ok:
                rank, value = self._cause(rank, value, workers)
                self._stop()  # the others may hang in a collective
                raise AssertionError(f"rank {rank} of {ranks} failed:\n{value}")
            results.append(value)
        if any(_threads(process.pid) > MOST_THREADS for process, _ in workers):
            self._stop()
        return results

    def _cause(self, rank: int, value: str, workers: list[Any]) -> tuple[int, str]:
        """Rank and traceback of one that did not merely lose its connection to another one."""
        for other, (_, pipe) in enumerate(workers):
            with contextlib.suppress(EOFError):
                if "Connection closed by peer" in value and pipe.poll(2):
                    ok, said = pipe.recv()
                    rank, value = (rank, value) if ok else (other, said)
        return rank, value

    def _stop(self) -> None:
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers.clear()


def _threads(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/task"))


def _work(pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    faulthandler.register(WHERE)
    import torch

    from xlstm_mcore.megatron.first_import import import_megatron

    import_megatron()
    from pretrain.layout import leave

    torch.set_num_threads(1)
    while True:
        try:
            rank, ranks, port, function, args = pipe.recv()
        except EOFError:
            return
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            _destroy_deepspeed()
            leave()
            _free_engines()


def _free_engines() -> None:
    """Let go of the engines that a call has left behind, and with them of their process groups.

    The hooks that Megatron's DDP puts on gradient accumulators keep it alive through C++, where the
    garbage collector does not look, so it is emptied instead. A gloo group has threads of its own:
    after a hundred calls a worker would have thousands.
    """
    from megatron.core.distributed import DistributedDataParallel

    for thing in gc.get_objects():
        if isinstance(thing, DistributedDataParallel):
            vars(thing).clear()
    gc.collect()
    if "deepspeed" in sys.modules:
        _forget_deepspeed_groups()


def _destroy_deepspeed() -> None:
    """DeepSpeed's own way to let go of an engine, while its groups are there."""
    import torch

    if "deepspeed" in sys.modules and torch.distributed.is_initialized():
        from deepspeed import DeepSpeedEngine
        from deepspeed.comm import comm

        if comm.cdb is None or not comm.cdb.is_initialized():
            return  # the groups are of another call, which used no DeepSpeed
        for thing in gc.get_objects():
            if isinstance(thing, DeepSpeedEngine):
                thing.destroy()
                vars(thing).pop("optimizer", None)


def _forget_deepspeed_groups() -> None:
    """Drop what DeepSpeed keeps in globals about a run, for a process that joins another one.

    Called after the groups themselves are destroyed.
    """
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    from pretrain.engines import deepspeed_compat

    groups._release_process_group_references()
    comm.cdb = None
    deepspeed_compat.restart_numbers()
