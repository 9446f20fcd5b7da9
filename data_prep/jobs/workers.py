"""Runs independent tasks in this process or in several, with shared progress and a clean stop.

Results do not depend on the number of workers: tasks share only a counter of bytes done and a flag
that asks them to stop.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self, TypeVar

from data_prep.jobs.progress import Progress
from xlstm_io.errors import Interrupted, MachineFailed
from xlstm_io.signals import stop_signals_blocked

_POLL_SECONDS = 0.2
Task = TypeVar("Task")
Result = TypeVar("Result")

_counter: Any = None  # of bytes done, shared by the worker processes of one call
_stop: Any = None  # an event that asks them to stop

Tick = Callable[[int], None]
"""Tells how many more bytes are done; raises Interrupted when the work is to stop."""


def available_cpus() -> int:
    """Cores that this process may use (what Slurm or taskset grant, not what the node has)."""
    return len(os.sched_getaffinity(0))


def _start_worker(counter: Any, stop: Any) -> None:
    global _counter, _stop
    _counter, _stop = counter, stop
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in worker processes only"
    parent.join()
    os._exit(1)  # the parent was killed: no process will take the result


def _worker_tick(amount: int) -> None:
    with _counter.get_lock():
        _counter.value += amount
    if _stop.is_set():
        raise Interrupted


def _in_worker(function: Callable[[Task, Tick], Result], task: Task) -> Result:
    return function(task, _worker_tick)


class Workers:
    """Worker processes that stay from one list of tasks to the next; use as a context manager.

    They start when there are tasks for them. A start costs each of them about a second of CPU,
    so the passes of a build share them.

    Args:
        count: processes; 1 runs every task in this process.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._executor: ProcessPoolExecutor | None = None

    def run(
        self,
        function: Callable[[Task, Tick], Result],
        tasks: Sequence[Task],
        progress: Progress,
    ) -> Iterator[tuple[int, Result]]:
        """Yield (task number, function(task, tick)) as tasks finish, in any order.

        Args:
            function: importable; calls `tick(bytes)` often; `tick` raises Interrupted on a stop.
            tasks: picklable arguments. A single one runs in this process.
            progress: told the sum of all ticks.

        Raises:
            Interrupted: the work is to stop.
            MachineFailed: a worker process was killed.
        """
        if self.count <= 1 or len(tasks) <= 1:
            yield from _here(function, tasks, progress)
            return
        if self._executor is None:
            self._start()
        assert self._executor is not None
        self._counter.value = 0
        try:
            with stop_signals_blocked():
                numbers = {
                    self._executor.submit(_in_worker, function, task): number
                    for number, task in enumerate(tasks)
                }
            pending = set(numbers)
            while pending:
                finished, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
                progress.set(self._counter.value)
                for future in finished:
                    yield numbers[future], future.result()
        except BrokenProcessPool:
            raise MachineFailed(
                "a worker process was killed (out of memory?); finished shards are kept: run "
                f"again, if it happens again with fewer than --workers {self.count} or a smaller "
                "--shard-mb"
            ) from None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # fork is unsafe beside tqdm's thread
        # Ctrl-C and Slurm reach every process, but the parent acts. That holds for the process
        # which multiprocessing starts for its locks, too.
        with stop_signals_blocked():
            self._counter, self._stop = context.Value("q", 0), context.Event()
        self._executor = ProcessPoolExecutor(
            self.count, context, initializer=_start_worker, initargs=(self._counter, self._stop)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._executor is not None:
            self._stop.set()
            self._executor.shutdown(wait=True, cancel_futures=True)


def _here(
    function: Callable[[Task, Tick], Result], tasks: Sequence[Task], progress: Progress
) -> Iterator[tuple[int, Result]]:
    done = 0

    def tick(amount: int) -> None:
        nonlocal done
        done += amount
        progress.set(done)

    for number, task in enumerate(tasks):
        yield number, function(task, tick)
