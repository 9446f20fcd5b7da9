"""Checks of the nodes before a life, by one task per rank under `srun`.

    srun ... python -m slurm.job.preflight LIFE_FOLDER

Every rank keeps `LIFE_FOLDER/preflight/RANK.json` and replaces it before every check, so that a
node which hangs or dies is named with the check that it did not survive. What follows from the
reports is `slurm.job.health`; no rank decides anything. On CPUs the same code runs with gloo.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from pretrain.processes.slurm_ranks import adopt_ranks
from slurm.job.gpus import gpu_problems
from slurm.job.health import FOLDER, Health
from slurm.job.state import HEALTH_FILE, RUN_FILE, write

COMMAND_S = 240  # of the site's own command
RENDEZVOUS_S = 120
SIDE = {"cpu": 256}  # of the matrices; on devices 8192
SIZE = {"cpu": 2**18}  # values of the all-reduces; on devices 2**26
ROUNDS = 3


class Bad(Exception):
    """A check has found that this node is bad; the message says why."""


class Report:
    """What this rank has found, on disk before each check.

    Args:
        folder: of the life.
        node: name of this node.
        rank: of this process.
    """

    def __init__(self, folder: Path, node: str, rank: int) -> None:
        self._path = folder / FOLDER / f"{rank:05d}.json"
        self._found: dict[str, Any] = {
            "node": node,
            "rank": rank,
            "doing": "",
            "done": False,
            "check": "",
            "bad": None,
            "interrupted": False,
            "facts": {},
        }

    @property
    def facts(self) -> dict[str, Any]:
        """What was measured."""
        return self._found["facts"]

    def check(self, name: str, function: Callable[[], None]) -> None:
        """Run a check; what it finds wrong is written down, and the next one follows."""
        self._found["doing"] = name
        write(self._path, self._found)
        try:
            function()
        except Bad as error:
            self._note(name, str(error))
        except Exception as error:
            self._note(name, f"{type(error).__name__}: {error}")

    def _note(self, name: str, why: str) -> None:
        if self._found["bad"] is None:  # the first one is the cause of the others
            self._found |= {"check": name, "bad": f"{name}: {why}"}

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handler of SIGTERM: Slurm ends the job, which says nothing about this node."""
        write(self._path, {**self._found, "interrupted": True})
        os._exit(0)

    def end(self) -> None:
        """All checks are over."""
        self._found["done"] = True
        write(self._path, self._found)


def check_disk(run: Path, limits: Health, facts: dict[str, Any]) -> None:
    """Space where the run lies and on the node's own disk, and whether files can be written."""
    places = [(run, limits.min_free_run_gb)]
    if limits.scratch is not None:
        Path(limits.scratch).mkdir(parents=True, exist_ok=True)
        places.append((Path(limits.scratch), limits.min_free_scratch_gb))
    for place, wanted in places:
        free = shutil.disk_usage(place).free / 1e9
        if free < wanted:
            raise Bad(f"{place} has {free:.1f} GB free, {wanted:.0f} are wanted")
        probe = place / f".preflight.{os.uname().nodename}.{os.getpid()}"
        data = os.urandom(2**22)
        began = time.perf_counter()
        with open(probe, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        facts.setdefault("write_mbs", []).append(
            round(len(data) / 1e6 / (time.perf_counter() - began), 1)
        )
        probe.unlink()


def check_command(limits: Health) -> None:
    """The site's own command."""
    if limits.command is None:
        return
    try:
        done = subprocess.run(
            ["/bin/bash", "-c", limits.command],
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Bad(f"{limits.command} did not end within {COMMAND_S} s") from None
    if done.returncode != 0:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["no output"]
        raise Bad(f"{limits.command} ended with {done.returncode}: {last[0]}")


def check_devices(limits: Health) -> None:
    """As many devices as the node is meant to have; the checks that follow use this rank's own."""
    import torch

    from xlstm_mcore import hardware

    seen = torch.accelerator.device_count()
    if seen != limits.devices:
        raise Bad(f"{seen} devices can be seen, {limits.devices} are meant to be there")
    hardware.choose_device()


def check_gpus(job: str) -> None:
    """Nothing of what `nvidia-smi` and the kernel know about a GPU makes it unfit."""
    problems = gpu_problems(job)
    if problems:
        raise Bad("; ".join(problems))


def check_kernels(run_file: Path) -> None:
    """The kernels of the run compute its cells on this rank's device."""
    from pretrain.config import load_config
    from pretrain.guard.kernel_check import kernel_problems

    problems = kernel_problems(load_config(run_file, quiet=True), _device())
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise Bad(problems[0] + more)


def check_product(limits: Health, facts: dict[str, Any]) -> None:
    """A matrix product twice: the same bits, and fast enough."""
    import torch

    from xlstm_mcore import hardware

    device = _device()
    side = SIDE.get(device.type, 8192)
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(side, side, generator=generator).to(device, torch.bfloat16)
    first = left @ left
    began = hardware.mark()  # behind the first product, which a device may not have done yet
    for _ in range(ROUNDS):
        again = left @ left
    seconds = hardware.seconds_between(began, hardware.mark()) / ROUNDS
    if not torch.equal(first, again):
        raise Bad("the same product gave other bits")
    facts["tflops"] = round(2 * side**3 / seconds / 1e12, 3)
    if device.type != "cpu":
        facts["device_tflops"] = True
    if limits.min_gemm_tflops is not None and facts["tflops"] < limits.min_gemm_tflops:
        raise Bad(f"{facts['tflops']} TFLOP/s, {limits.min_gemm_tflops} are wanted")


def _device() -> Any:
    from xlstm_mcore import hardware

    return hardware.device()


def check_rendezvous(facts: dict[str, Any]) -> None:
    """All ranks find each other, and read their clocks at the same moment."""
    import torch
    import torch.distributed as dist

    from pretrain.processes.rendezvous import allow_connections
    from xlstm_mcore import hardware

    allow_connections(int(os.environ["WORLD_SIZE"]))
    options = hardware.process_group_options()
    dist.init_process_group(timeout=timedelta(seconds=RENDEZVOUS_S), **options)
    together = torch.ones(1, device=_device())
    dist.all_reduce(together)
    total = int(together.item())  # a device has only been asked until here
    facts["clock"] = time.time()
    if total != dist.get_world_size():
        raise Bad(f"an all-reduce of ones gave {total}")


def check_links(nodes: Sequence[str], facts: dict[str, Any]) -> None:
    """All-reduces within the node, and between pairs of nodes in two rounds."""
    import torch
    import torch.distributed as dist

    local = int(os.environ["LOCAL_WORLD_SIZE"])
    rank, world = dist.get_rank(), dist.get_world_size()
    values = torch.ones(SIZE.get(_device().type, 2**26), device=_device())
    facts["links"] = []
    starts = range(0, world, local)
    within = [dist.new_group(list(range(start, start + local))) for start in starts]
    if local > 1:
        facts["within_gbs"] = _speed(values, within[rank // local])
    for first, second in pairs(len(nodes)):
        leaders = [first * local, second * local]
        group = dist.new_group(leaders)
        if rank in leaders:
            other = nodes[second if rank == leaders[0] else first]
            facts["links"].append({"with": other, "gbs": _speed(values, group)})
    dist.barrier()


def pairs(count: int) -> list[tuple[int, int]]:
    """Neighbours in a ring of nodes, first every other pair and then the rest."""
    if count < 2:
        return []
    ring = [(node, (node + 1) % count) for node in range(count if count > 2 else 1)]
    return ring[::2] + ring[1::2]


def _speed(values: Any, group: Any) -> float:
    """Gigabytes per second of an all-reduce."""
    import torch.distributed as dist

    from xlstm_mcore import hardware

    dist.all_reduce(values, group=group)
    began = hardware.mark()
    for _ in range(ROUNDS):
        dist.all_reduce(values, group=group)
    seconds = hardware.seconds_between(began, hardware.mark()) / ROUNDS
    return round(values.numel() * values.element_size() / seconds / 1e9, 3)


def versions() -> str:
    """What must be the same everywhere: Python, torch and this package's commit."""
    import torch

    found = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    commit = found.stdout.strip() or "no commit"
    return f"Python {platform.python_version()}, torch {torch.__version__}, {commit}"


def main(words: Sequence[str]) -> int:
    """Run all checks of this rank; 0 whatever they find, because the reports say it."""
    adopt_ranks()
    folder = Path(words[0])
    limits = Health(**json.loads((folder.parent / HEALTH_FILE).read_bytes()))
    nodes = os.environ["XLSTM_NODES"].split()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    node = os.environ.get("SLURMD_NODENAME") or platform.node()
    report = Report(folder, node, rank)
    signal.signal(signal.SIGTERM, report.interrupt)
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # the batch script looks for a request to stop
        signal.signal(number, signal.SIG_IGN)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        report.check("disk", lambda: check_disk(folder.parent.parent, limits, report.facts))
        report.check("command", lambda: check_command(limits))
        if limits.devices:
            report.check("gpus", lambda: check_gpus(os.environ["SLURM_JOB_ID"]))
    report.check("imports", lambda: report.facts.update(versions=versions()))
    report.check("devices", lambda: check_devices(limits))
    report.check("product", lambda: check_product(limits, report.facts))
    report.check("kernels", lambda: check_kernels(folder.parent / RUN_FILE))
    if world > 1:
        report.check("rendezvous", lambda: check_rendezvous(report.facts))
        report.check("links", lambda: check_links(nodes, report.facts))
    report.end()
    # Not a clean shutdown: behind a broken link it could wait for ever.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
