"""A pipeline that runs ahead of its consumer, in a thread or in worker processes."""

import gc
import multiprocessing
import queue
import signal
import threading
import weakref
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import webdataset as wds

from xlstm_io.signals import signal_at_parents_death, stop_signals_blocked

PREFETCH_STEPS = 2  # of the thread, or of each worker process
_POLL_SECONDS = 0.1  # how long a thread may outlive the loader that it works for


def _produce(pipeline: wds.DataPipeline, out: queue.Queue, stop: threading.Event) -> None:
    """Fill `out` from the pipeline until `stop` or its end."""
    for item in pipeline:
        while not stop.is_set():
            try:
                out.put(item, timeout=_POLL_SECONDS)
                break
            except queue.Full:
                continue
        if stop.is_set():
            return


class ReadingThread:
    """A pipeline that runs ahead in a thread. It starts when the first item is asked for.

    The thread refers to pipeline, queue and event but not to the loader, so that an abandoned
    loader is collected and its finaliser ends the thread.
    """

    def __init__(self, pipeline: wds.DataPipeline) -> None:
        self._stop = threading.Event()
        self._queue: queue.Queue = queue.Queue(maxsize=PREFETCH_STEPS)
        self._thread = threading.Thread(
            target=_produce,
            args=(pipeline, self._queue, self._stop),
            name="train-loader",
            daemon=True,
        )
        self._finalizer = weakref.finalize(self, self._stop.set)

    def get(self) -> Any:
        """The next item; StopIteration after `close`."""
        if self._stop.is_set():
            raise StopIteration
        if self._thread.ident is None:
            self._thread.start()
        return self._queue.get()

    def waits_for(self) -> str:
        """What `get` waits for, in the words of a message."""
        return "the next batch, which a thread reads"

    def close(self) -> None:
        """End the thread and wait for it."""
        self._finalizer()
        if self._thread.ident is not None:
            self._thread.join()


class ReadingProcesses:
    """A pipeline that runs ahead in worker processes, which start with the first item.

    Slurm and terminals signal every process, but the trainer alone handles a request to stop, so
    the workers are forked with those signals blocked. DataLoader would send SIGTERM to end a
    worker, which is one of them, so workers that are left are ended by SIGKILL. The kernel does
    that too when the trainer itself is killed.
    """

    def __init__(self, pipeline: wds.DataPipeline, workers: int) -> None:
        self._loader = wds.WebLoader(
            pipeline,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=PREFETCH_STEPS,
            worker_init_fn=_start_worker,
            multiprocessing_context="fork",  # not the default everywhere
        )
        self._iterator: Iterator | None = None
        self._workers: list[BaseProcess] = []
        self._finalizer = weakref.finalize(self, _kill, self._workers)
        self._closed = False

    def get(self) -> Any:
        """The next item; StopIteration after `close`."""
        if self._closed:
            raise StopIteration
        if self._iterator is not None:
            return next(self._iterator)
        others, collects = set(multiprocessing.active_children()), gc.isenabled()
        gc.disable()  # `_start_worker` goes on from there
        try:
            with stop_signals_blocked():
                self._iterator = iter(self._loader)
                first = next(self._iterator)
        finally:
            if collects:
                gc.enable()
            self._workers += [p for p in multiprocessing.active_children() if p not in others]
        return first

    def waits_for(self) -> str:
        """The same: the processes, and what the kernel says that each does."""
        # Before the first item their numbers are not known yet.
        found = sorted(worker.pid for worker in self._workers if worker.pid is not None)
        each = ", ".join(f"{pid} ({_state(pid)})" for pid in found)
        return "the next batch, which the loader's worker processes read" + (each and f": {each}")

    def close(self) -> None:
        """End the processes and wait for them."""
        self._closed = True
        self._iterator = None  # DataLoader's iterator tells its workers to end when it goes
        self._finalizer()


def _start_worker(worker: int) -> None:
    """In a worker process, first of all."""
    signal_at_parents_death(signal.SIGKILL)
    # What the trainer has left for collection stays there. A group of gloo's would wait in its
    # destructor for threads that a fork does not have.
    gc.freeze()
    gc.enable()


def _as_it_is(item: Any) -> Any:
    """No conversion. DataLoader's own would make tensors of arrays."""
    return item


# The kernel's letters in /proc/PID/stat.
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a disk",
    "T": "stopped",
    "t": "held by a debugger",
}


def _state(pid: int) -> str:
    """What a process does, as Linux says it; `gone` where there is no such process."""
    try:
        about = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "gone"
    letter = about.rpartition(")")[2].split()[0]  # the name before it may hold anything
    return _STATES.get(letter, "gone")


def _kill(workers: list[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()
        worker.join()
