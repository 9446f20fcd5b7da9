"""What is known of a kernel launch before it runs: enough to compile it on a machine without a GPU.

`benchmarks/compiled/aot.py` compiles and counts variants. This module does not import Triton.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from xlstm_kernels.common.triton_launch import Launch

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
POINTERS = {
    "torch.float32": "*fp32",
    "torch.float64": "*fp64",
    "torch.bfloat16": "*bf16",
    "torch.float16": "*fp16",
    "torch.bool": "*u1",
    "torch.uint8": "*u8",
    "torch.int8": "*i8",
    "torch.int32": "*i32",
    "torch.int64": "*i64",
}


@dataclass(frozen=True)
class Variant:
    """One specialisation of one kernel, and the launch it was made for.

    Attributes:
        name: Unique among all variants.
        fn: The kernel.
        signature: Every argument, in order, with its Triton type ("*bf16", "i32", "fp32") or
            "constexpr".
        constexprs: Values of the "constexpr" arguments.
        num_warps: Warps of a program.
        num_stages: Stages of software pipelines.
        grid: Programs along each axis.
        bytes: Sizes of all tensors of the launch, each counted once.
        flops: Floating-point operations of tensor cores.
        divisible: Arguments that are multiples of 16 at launch (for a pointer: its address). Loads
            are vectorised only then. None means every pointer.
        setting: The model that the launch belongs to, such as "7b" or "125m": all launches of a
            setting are one forward and backward pass. "" for a launch that is only compiled.
        phase: "gates", "fw", "bw" or "step".
        count: Launches in one forward and backward pass.
        steps: For the latency floor of a recurrence: time steps that one launch does in turn.
        inner_loops: Likewise: turns of the loops inside a step, outermost first.
        step_bytes: Likewise: bytes that one program reads again at every step.
        cooperative: Whether all programs run at the same time, and meet at every step.
    """

    name: str
    fn: object
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    grid: tuple[int, ...]
    bytes: int
    flops: int
    divisible: tuple[str, ...] | None = None
    setting: str = ""
    phase: str = "fw"
    count: int = 1
    steps: int = 0
    inner_loops: tuple[int, ...] = ()
    step_bytes: int = 0
    cooperative: bool = False

    def aligned(self) -> list[str]:
        """Names of the arguments that are multiples of 16."""
        if self.divisible is not None:
            return list(self.divisible)
        return [name for name, kind in self.signature.items() if kind.startswith("*")]


def make_variant(name: str, fn, arguments: Mapping[str, object], **launch) -> Variant:
    """The variant that Triton compiles for a launch of `fn` with `arguments`.

    Specialises as Triton does: 1 becomes a constant, a multiple of 16 is noted as one.

    Args:
        name: Name of the variant.
        fn: The kernel.
        arguments: What the launch passes, by name: tensors (of the meta device, if there is no
            other), None for a pointer that is absent, numbers, and values of constexpr parameters.
        launch: The other fields of `Variant`.

    Raises:
        ValueError: If arguments are missing or unknown.
    """
    parameters = inspect.signature(fn.fn).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    arguments = defaults | dict(arguments)
    if missing := [n for n in parameters if n not in arguments]:
        raise ValueError(f"{name}: the launch lacks {', '.join(missing)}; pass every argument")
    if unknown := [n for n in arguments if n not in parameters]:
        raise ValueError(f"{name}: {fn.__name__} has no argument {', '.join(unknown)}; drop it")
    plain = {p.name for p in getattr(fn, "params", ()) if p.do_not_specialize}
    signature, constants, divisible = {}, {}, []
    for parameter in parameters.values():
        key, value = parameter.name, arguments[parameter.name]
        kind, aligned = _specialise(value, key in plain)
        if "constexpr" in str(parameter.annotation) or kind == "constexpr":
            kind, aligned = "constexpr", False
            constants[key] = value
        signature[key] = kind
        if aligned:
            divisible.append(key)
    return Variant(name, fn, signature, constants, divisible=tuple(divisible), **launch)


def _specialise(value: object, plain: bool) -> tuple[str, bool]:
    """Triton type of an argument, and whether it is a multiple of 16; `plain`: nothing assumed."""
    if isinstance(value, Tensor):
        # A fresh allocation is aligned; a view at an odd offset is not.
        return POINTERS[str(value.dtype)], value.storage_offset() * value.itemsize % 16 == 0
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, int):
        if value == 1 and not plain:
            return "constexpr", False
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0 and not plain
    if isinstance(value, float):
        return "fp32", False
    return "constexpr", False


def variant_of(
    launch: "Launch", suffix: str, phase: str, flops: int = 0, setting: str = ""
) -> Variant:
    """The variant of a planned launch, named after the launch and `suffix`."""
    tensors = {id(x): x for x in launch.arguments.values() if isinstance(x, Tensor)}
    return make_variant(
        f"{launch.name} {suffix}",
        launch.kernel,
        launch.arguments,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        grid=launch.grid,
        bytes=sum(x.numel() * x.itemsize for x in tensors.values()),
        flops=flops,
        setting=setting,
        phase=phase,
        cooperative=launch.cooperative,
    )
