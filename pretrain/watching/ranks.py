"""Slow ranks: what each rank does between its collectives, every `logging.ranks` steps.

A collective ends on all ranks at the same time, so the wall time of a step is the same everywhere,
and a slow machine shows in the *others'* waiting. Within a watched step every collective, and every
wait for one, is timed where it holds up this rank: on a GPU between two events of the stream that
computes, on a CPU by the clock. What is left of the step is the rank's own computing.

A rank is compared with the median of its pipeline stage, because stages may differ in work. A host
whose slowest rank is behind in every one of the last `LOOKS` looks is named, until it catches up.
"""

import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist

from pretrain.config import RunConfig
from pretrain.layout import Layout
from pretrain.watching.metrics import MetricLogger
from pretrain.watching.watcher import StepWatcher, WatchedStep
from xlstm_mcore import hardware

BEHIND = 0.08  # of the median: what makes a rank slow
LOOKS = 20  # looks in a row after which a slow host is named
FIGURES = ("compute", "data_wait", "host")
# Every collective of torch goes through one of these, whatever name it was imported by. Releases of
# torch differ in some names; those that are not there are passed over.
CALLS = (
    "_allgather_base", "_end_coalescing", "_reduce_scatter_base", "all_gather_single",
    "all_gather_single_coalesced", "all_to_all_single", "allgather", "allgather_coalesced",
    "allgather_into_tensor_coalesced", "allreduce", "allreduce_coalesced", "alltoall",
    "alltoall_base", "barrier", "broadcast", "gather", "gather_single", "recv", "recv_anysource",
    "reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced", "scatter", "send",
)  # fmt: skip


class RankWatcher(StepWatcher):
    """Compares the ranks.

    Args:
        config: the run.
        layout: where this process stands.
    """

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self.every = config.logging.ranks if layout.world_size > 1 else 0
        self._layout = layout
        self._timer = CollectiveTimer()
        self._started = self._host = 0.0
        self._slow: SlowHosts | None = None

    @property
    def stragglers(self) -> list[str]:
        """The hosts that are behind now; the same on every rank."""
        return [] if self._slow is None else self._slow.named

    def __enter__(self) -> Self:
        self._timer.start()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._timer.stop()

    def enqueued(self) -> None:
        """Note how long the host took."""
        self._host = time.perf_counter() - self._started - self._timer.host_seconds

    def tell(self, seen: WatchedStep, metrics: MetricLogger) -> None:
        """Compare the ranks and log what was found."""
        if self._slow is None:
            place = host_name(), self._layout.groups.pp.rank()
            self._slow = SlowHosts(*zip(*self._layout.gather(place), strict=True))
        mine = torch.tensor(
            [self._timer.seconds_between(), seen.data_wait, self._host],
            dtype=torch.float64,
            device=self._layout.device,
        )
        everyone = [torch.empty_like(mine) for _ in range(self._layout.world_size)]
        dist.all_gather(everyone, mine)
        columns = torch.stack(everyone).t().tolist()
        values: dict[str, float | int] = {}
        for name, column in zip(FIGURES, columns, strict=True):
            for kind, of in (("min", min), ("median", statistics.median), ("max", max)):
                values[f"ranks/{name}_seconds_{kind}"] = of(column)
        values["ranks/slowest"] = max(range(len(columns[0])), key=columns[0].__getitem__)
        metrics.log(seen.step, values)
        for line in self._slow.add(columns[0], seen.step):
            metrics.message(line)


def host_name() -> str:
    """This machine's name, Slurm's where it has given one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass
class _Host:
    """How a host has done.

    Attributes:
        looks: looks in a row in which it was behind.
        since: step of the first of them.
    """

    looks: int = 0
    since: int = 0


class SlowHosts:
    """Finds the hosts that are behind for long.

    Args:
        hosts: the host of every rank.
        stages: its pipeline stage.
    """

    def __init__(self, hosts: Sequence[str], stages: Sequence[int]) -> None:
        self._places, self._stages = hosts, stages
        self._hosts = {host: _Host() for host in hosts}
        self.named: list[str] = []

    def add(self, compute: Sequence[float], step: int) -> list[str]:
        """Take one look into account.

        Args:
            compute: seconds of every rank between its collectives.
            step: finished steps.

        Returns:
            What a person is told.
        """
        medians = {
            stage: statistics.median(
                s for s, of in zip(compute, self._stages, strict=True) if of == stage
            )
            for stage in set(self._stages)
        }
        said = []
        for host, found in self._hosts.items():
            behind, rank = max(
                (compute[rank] / max(medians[self._stages[rank]], 1e-9) - 1, rank)
                for rank, place in enumerate(self._places)
                if place == host
            )
            if behind < BEHIND:
                if host in self.named:
                    self.named.remove(host)
                    said.append(f"host {host} has caught up at step {step}")
                self._hosts[host] = _Host()
                continue
            found.looks += 1
            found.since = found.since or step
            if found.looks == LOOKS:
                self.named.append(host)
                seconds, median = compute[rank], medians[self._stages[rank]]
                said.append(
                    f"host {host} is slow: in each of {LOOKS} looks since step {found.since} one "
                    f"of its ranks was {BEHIND:.0%} or more behind; at step {step} rank {rank} "
                    f"computes for {seconds:.3f} s and the median rank for {median:.3f} s"
                )
        return said


class CollectiveTimer:
    """Measures what this rank computes between its collectives, from `start` to `stop`."""

    def __init__(self) -> None:
        self.host_seconds = 0.0  # that the host was held up in collectives
        self._marks: list[tuple[Any, Any]] = []
        self._originals: list[tuple[type, str, Any]] = []
        self._lock = threading.Lock()  # the backward pass runs in threads of its own

    def start(self) -> None:
        """Begin to measure."""
        self.host_seconds, self._marks = 0.0, []
        self._owner = threading.current_thread()
        for owner, names in ((dist.ProcessGroup, CALLS), (dist.Work, ("wait",))):
            for name in names:
                if name in vars(owner):
                    # The descriptor goes back. What `getattr` gives is a function without a self.
                    self._originals.append((owner, name, vars(owner)[name]))
                    setattr(owner, name, self._timed(getattr(owner, name)))
        self._begin = hardware.mark()

    def stop(self) -> None:
        """End the measurement."""
        self._end = hardware.mark()
        while self._originals:
            owner, name, original = self._originals.pop()
            setattr(owner, name, original)

    def seconds_between(self) -> float:
        """Seconds between the collectives; waits for the device."""
        held_up = sum(hardware.seconds_between(*pair) for pair in self._marks)
        return hardware.seconds_between(self._begin, self._end) - held_up

    def _timed(self, original: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            # A checkpoint is written in a thread of Python, with messages of its own. The threads
            # of the backward pass are torch's, which Python has not started.
            thread = threading.current_thread()
            if thread is not self._owner and type(thread) is threading.Thread:
                return original(*args, **options)
            with self._held_up():
                return original(*args, **options)

        return call

    @contextmanager
    def _held_up(self) -> Iterator[None]:
        started, first = time.perf_counter(), hardware.mark()
        try:
            yield
        finally:
            with self._lock:
                self._marks.append((first, hardware.mark()))
                self.host_seconds += time.perf_counter() - started
