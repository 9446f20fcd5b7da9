"""What every Triton backend shares: launches as data, where they can run, and running them.

A launch is planned on any device, also on the meta device: `benchmarks/kernel_variants` compiles
planned launches for GPUs that are not there.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

log = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16)
NOT_TRITON = ("cpu", "meta", "mps")


@triton.jit
def _nothing():
    """Shows what triton.jit makes of a kernel in this process."""


INTERPRETED = not isinstance(_nothing, triton.JITFunction)


@dataclass
class Launch:
    """A kernel, its grid and its arguments, run-time and compile-time ones together.

    Attributes:
        name: What the launch computes, for reports.
        kernel: The function that `triton.jit` made.
        grid: Programs along each axis.
        arguments: What the kernel is called with, by name.
        num_warps: Warps of a program.
        num_stages: Stages of software pipelines.
        cooperative: Whether the driver must run all programs at the same time, or refuse.
    """

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    cooperative: bool = False

    def run(self) -> None:
        """Launch on the current stream."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.cooperative and not INTERPRETED:
            options["launch_cooperative_grid"] = True
        self.kernel[self.grid](**self.arguments, **options)


def unsupported_reason(like: Tensor, *, asked: bool, **facts: object) -> str | None:
    """Why no Triton kernel can run on tensors like this one, with the remedy; None if one can.

    `like` has a device and a dtype. `asked` says whether the caller named this backend: under the
    interpreter it then runs on CPU tensors as well. `facts` are what other backends decide by.
    """
    if like.device.type in NOT_TRITON and not (asked and INTERPRETED):
        return (
            f"Triton does not run on {like.device.type} tensors (but, slowly, on CPU tensors with "
            "TRITON_INTERPRET=1 set before the import); move them to a GPU or use 'torch'"
        )
    if like.dtype not in DTYPES:
        return (
            f"the Triton kernels take float32 and bfloat16, not {like.dtype}; convert, or "
            "use 'torch'"
        )
    return None


def architecture(device: torch.device) -> str:
    """Name of a GPU's architecture as compilers call it; "interpreter" for a CPU."""
    if device.type == "cpu":
        return "interpreter"
    with torch.accelerator.device_index(device.index):
        target = triton.runtime.driver.active.get_current_target()
    name = target.arch if isinstance(target.arch, str) else f"sm_{target.arch}"
    warn_of_old_assembler(name)
    return name


@cache
def warn_of_old_assembler(name: str) -> None:
    """Say once that this process assembles for Hopper with a ptxas that has a known fault.

    It can reuse the input registers of an asynchronous product too early (triton pull request
    11781; right since 13.4). A search of our compiled kernels found no such place.
    """
    if name != "sm_90":
        return
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(90)
    if tuple(int(x) for x in tool.version.split(".")[:2]) < (13, 4):
        log.warning(
            "kernels for sm_90 are assembled by ptxas %s of %s, which has a known fault (triton "
            "pull request 11781); set TRITON_PTXAS_PATH to one of version 13.4 or newer",
            tool.version,
            tool.path,
        )


def run_all(launches: Iterable[Launch], like: Tensor) -> None:
    """Run launches in order on the device of `like`."""
    if like.device.type == "cpu":
        for launch in launches:
            launch.run()
        return
    with torch.accelerator.device_index(like.device.index):
        for launch in launches:
            launch.run()
