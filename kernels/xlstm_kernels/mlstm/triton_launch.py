"""One Triton launch as data: it can be run, or described for compilation without a device."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xlstm_kernels.aot import Variant, make_variant


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
