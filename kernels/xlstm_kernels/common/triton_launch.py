"""What every Triton backend shares: launches as data, where they can run, and running them.

A launch can be run, or described for compilation without a device.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from xlstm_kernels.common.aot import Variant, make_variant

DTYPES = (torch.float32, torch.bfloat16)
NOT_TRITON = ("cpu", "meta", "mps")


@triton.jit
def _nothing():
    """Shows what triton.jit makes of a kernel in this process."""


INTERPRETED = not isinstance(_nothing, triton.JITFunction)


@dataclass
class Launch:
    """A kernel, its grid and its arguments, run-time and compile-time ones together.

    `flops` are those of tensor cores; `phase` is "gates", "fw", "bw" or "step".
    """

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    phase: str
    flops: int = 0

    def run(self) -> None:
        """Launch on the current stream."""
        self.kernel[self.grid](
            **self.arguments, num_warps=self.num_warps, num_stages=self.num_stages
        )

    def variant(self, prefix: str, setting: str = "") -> Variant:
        """What the ahead-of-time compilation and the resources report need to know."""
        tensors = {id(x): x for x in self.arguments.values() if isinstance(x, Tensor)}
        return make_variant(
            f"{self.name} {prefix}",
            self.kernel,
            self.arguments,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            grid=self.grid,
            bytes=sum(x.numel() * x.itemsize for x in tensors.values()),
            flops=self.flops,
            setting=setting,
            phase=self.phase,
        )


def refusal(like: Tensor, *, asked: bool) -> str | None:
    """Why no Triton kernel can run on tensors like this one, with the remedy; None if one can.

    `like` has a device and a dtype. `asked` says whether the caller named this backend: under the
    interpreter it then runs on CPU tensors as well.
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
    return target.arch if isinstance(target.arch, str) else f"sm_{target.arch}"


def run_all(launches: Iterable[Launch], like: Tensor) -> None:
    """Run launches in order on the device of `like`."""
    if like.device.type == "cpu":
        for launch in launches:
            launch.run()
        return
    with torch.accelerator.device_index(like.device.index):
        for launch in launches:
            launch.run()
