"""What is known of a kernel launch before it runs: enough to compile it on a machine without a GPU.

A module with "triton" in its name describes the launches it can make as a list of `Variant`, in a
function ``triton_variants(target)``; `find_variants` collects them. Compiling and counting them is
the work of ``benchmarks/kernel_resources.py``. This module imports no Triton.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
POINTERS = {
    "torch.float32": "*fp32",
    "torch.float64": "*fp64",
    "torch.bfloat16": "*bf16",
    "torch.float16": "*fp16",
    "torch.bool": "*i1",
    "torch.uint8": "*u8",
    "torch.int8": "*i8",
    "torch.int32": "*i32",
    "torch.int64": "*i64",
}


@dataclass(frozen=True)
class Variant:
    """One specialisation of one kernel, and the launch it was made for.

    `signature` maps every argument, in order, to its Triton type ("*bf16", "i32", "fp32") or
    "constexpr"; `constexprs` has the values of the latter; `divisible` names the arguments that are
    multiples of 16 at launch (for a pointer: its address), without which loads are not vectorised.
    `bytes` are read and written once per tensor and launch, `flops` those of tensor cores.
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
    divisible: tuple[str, ...] | None = None  # None: every pointer
    setting: str = ""  # "7b", "125m": part of one forward and backward pass; "": to be compiled
    phase: str = "fw"  # "gates", "fw", "bw" or "step"
    count: int = 1  # launches in one forward and backward pass
    # For the latency floor of a recurrence:
    steps: int = 0  # time steps that one launch does, one after the other
    inner_loops: tuple[int, ...] = ()  # turns of the loops inside a step, outermost first
    step_bytes: int = 0  # read again by one program at every step

    def aligned(self) -> list[str]:
        """Names of the arguments that are multiples of 16."""
        if self.divisible is not None:
            return list(self.divisible)
        return [name for name, kind in self.signature.items() if kind.startswith("*")]


def make_variant(name: str, fn, arguments: Mapping[str, object], **launch) -> Variant:
    """The variant that Triton compiles for a launch of `fn` with `arguments`.

    Arguments map names to what the launch passes: tensors (of the meta device, if no other is
    there), None for a pointer that is absent, numbers, and the values of constexpr parameters.
    Specialises as Triton does: 1 becomes a constant, a multiple of 16 is noted as one. `launch`
    has the other fields of `Variant`. Raises ValueError if names are missing or unknown.
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
        return "i1", False
    if isinstance(value, int):
        if value == 1 and not plain:
            return "constexpr", False
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0 and not plain
    if isinstance(value, float):
        return "fp32", False
    return "constexpr", False


def find_variants(target: str, package: str = "xlstm_kernels") -> list[Variant]:
    """All variants of all modules of `package` for one of `TARGETS`.

    Raises ValueError for an unknown target and for two variants of one name.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is not known; use one of {', '.join(TARGETS)}")
    variants: list[Variant] = []
    root = importlib.import_module(package)
    for info in pkgutil.walk_packages(root.__path__, f"{package}."):
        if "triton" in info.name.split("."):
            describe = getattr(importlib.import_module(info.name), "triton_variants", None)
            if describe is not None and describe.__module__ == info.name:  # not an imported one
                variants += describe(target)
    names = [variant.name for variant in variants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two variants are called {twice[0]!r}; give each its own name")
    return variants
