"""The process layout of a run: device, process groups and this process's place in them."""

import datetime
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from pretrain.config import RunConfig, check_world
from pretrain.processes.devices import set_device_defaults
from pretrain.processes.environment import read_place
from pretrain.processes.rendezvous import meet
from xlstm_io.signals import StopSignal
from xlstm_mcore import hardware
from xlstm_mcore.megatron import compat, cpu_runtime


@dataclass(frozen=True)
class Layout:
    """Where this process stands.

    Attributes:
        rank: global rank.
        world_size: processes of the run.
        device: the device this process computes on; everything else asks here.
        backend: communication backend, "gloo" or "nccl".
        groups: Megatron's process groups.
    """

    rank: int
    world_size: int
    device: torch.device
    backend: str
    groups: ProcessGroupCollection

    @property
    def dp_rank(self) -> int:
        """This process's place among the data-parallel replicas."""
        return self.groups.dp.rank()

    @property
    def dp_size(self) -> int:
        """Data-parallel replicas."""
        return self.groups.dp.size()

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and writes metrics."""
        return self.rank == 0

    def seed_step(self, seed: int, step: int) -> None:
        """Set all random states as a function of (seed, step, place in the layout).

        A resumed run draws the same numbers as one that was not interrupted, and no random state
        has to be stored.
        """
        # dp_cp: context-parallel ranks hold other tokens, and must draw other dropout masks.
        place = self.groups.dp_cp.rank()
        base = (seed * 1_000_003 + step * 8191 + place * 131) % (2**31)
        torch.manual_seed(base)
        compat.seed_parallel(base)

    def sum(self, value: float) -> float:
        """The sum of a number over all processes (fp64)."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def max(self, value: float) -> float:
        """The largest of a number over all processes."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def _reduced(self, value: float, operation: dist.ReduceOp.RedOpType) -> float:
        reduced = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(reduced, op=operation)
        return reduced.item()

    def any(self, value: bool) -> bool:
        """Whether any process says so."""
        return self.max(float(value)) > 0

    def gather(self, value: Any) -> list[Any]:
        """Any small picklable value of every process, by rank."""
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def own_file(self, folder: Path, name: str) -> Path | None:
        """A file of JSON lines for this replica; None on all but one of its processes."""
        groups = self.groups
        first = groups.tp.rank() == groups.pp.rank() == groups.cp.rank() == 0
        return folder / f"{name}-{self.dp_rank:05d}.jsonl" if first else None

    def close(self) -> None:
        """Leave all process groups."""
        leave()


def leave() -> None:
    """Destroy Megatron's and torch's process groups, if there are any."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def make_deterministic() -> None:
    """Ask torch, cuBLAS and NCCL for the same bits every time; before either of them starts.

    The environment wins where it says something else. Operations without a deterministic version
    raise, so nothing is left out silently.
    """
    torch.use_deterministic_algorithms(True)
    # It would also fill every new tensor, which hides nothing here and costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")


def start(config: RunConfig, stop: StopSignal | None = None, *, alone: bool = False) -> Layout:
    """Join the run's process groups as its configuration lays them out.

    Args:
        config: the run. RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR come from the launcher;
            without them the run has one process.
        stop: the request to stop, heard while other ranks are waited for.
        alone: one process, whatever the launcher says.

    Raises:
        ConfigError: the number of processes does not fit the layout, or the launcher's variables
            are wrong.
        MachineFailed: not all ranks came within `guard.rendezvous_timeout`.
        Interrupted: a rank was asked to stop before all had come.
    """
    place = None if alone else read_place()
    world_size = 1 if place is None else place.world_size
    check_world(config, world_size)
    set_device_defaults(config.layout.tensor)
    cpu_runtime.activate()
    if config.run.deterministic:
        make_deterministic()
    options = hardware.process_group_options()
    if options["backend"] == "nccl":
        # What NCCL did last, for the watchdog's report; the second is the older name.
        for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
            os.environ.setdefault(name, "2000")
    if place is None:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    else:
        store = meet(place, config.guard.rendezvous_timeout, stop)
        options |= {"store": store, "rank": place.rank, "world_size": world_size}
    # Longer than any checkpoint: a rank that waits for another's disk must not give up first.
    dist.init_process_group(timeout=datetime.timedelta(minutes=30), **options)
    shape = config.layout
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=shape.tensor,
        pipeline_model_parallel_size=shape.pipeline,
        virtual_pipeline_model_parallel_size=shape.virtual if shape.virtual > 1 else None,
        context_parallel_size=shape.context,
        create_gloo_process_groups=False,
    )
    layout = Layout(
        rank=dist.get_rank(),
        world_size=world_size,
        device=hardware.device(),
        backend=options["backend"],
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    )
    layout.seed_step(config.run.seed, 0)
    return layout
