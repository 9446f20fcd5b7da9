"""What every operator of a training step reads, writes and computes, on tensors without data.

The engine that trains runs on the device that does not exist (`pretrain.rehearsal`). Each operator
that reaches the device is written down with its bytes, operations and launches. An operator of
`xlstm_kernels` is taken apart: its own code runs on tensors that are only shapes, and what it
launches and asks torch for is written down. A tensor counts once where it is read and once where it
is written: caches help within a kernel and not between kernels.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.counting.device_limits import BANDWIDTH, BF16_PRODUCTS, CELL_FACTOR, FP32_PRODUCTS
from benchmarks.kernel_variants import mlstm, qkv
from pretrain.rehearsal.device import NAME, RehearsalMode
from pretrain.rehearsal.record import RankRecord
from xlstm_kernels.common.triton_launch import Launch
from xlstm_mcore.recompute import memory_of

ARCHITECTURE = 90
_ATEN = torch.ops.aten
_FREE = (
    "aten::detach", "aten::empty", "aten::lift_fresh", "aten::new_empty", "aten::_unsafe_view",
)  # fmt: skip
_OURS, _SLSTM = "xlstm_kernels::", "xlstm_kernels::slstm"  # whose launches follow the sequence
_PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1}


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        name: of the operator, or of the launch in it.
        bytes: read and written.
        flops: operations of matrix products.
        narrow: whether these take bf16 operands.
        cell: whether it is a part of the mLSTM cell, whose bound is multiplied by `CELL_FACTOR`.
        backward: whether it runs in the backward pass.
    """

    name: str
    bytes: int
    flops: int = 0
    narrow: bool = True
    cell: bool = False
    backward: bool = False

    @property
    def seconds(self) -> float:
        """The least time that it takes by its bytes and its operations."""
        rate = BF16_PRODUCTS if self.narrow else FP32_PRODUCTS
        bound = max(self.bytes / BANDWIDTH, self.flops / rate)
        return bound * (CELL_FACTOR if self.cell else 1.0)


class CountingMode(RehearsalMode):
    """A rehearsal that counts what every operator does.

    Attributes:
        kernels: in the order of their launches, while `counting` is true.
        dispatches: operators that reached the device, views and those inside of ours included:
            how many of each name, forward and backward.
    """

    def __init__(self) -> None:
        super().__init__(RankRecord(0))
        self.kernels: list[Kernel] = []
        self.dispatches: dict[tuple[str, bool], int] = {}
        self.counting = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run one operator on tensors without data, and count it."""
        name = func._schema.name
        if not self.counting or not name.startswith(_OURS) or name.startswith(_SLSTM):
            return super().__torch_dispatch__(func, types, args, kwargs)
        self.counting = False  # what describes the operator's results is not what it does
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.counting = True
        with _disable_current_modes():
            kernels, inside = of_operator(func, args, kwargs or {})
        backward = _is_backward()
        self.kernels += [replace(kernel, backward=backward) for kernel in kernels]
        self._count(name)
        for one in inside:
            self._count(one)
        return result

    def _see(self, func: Any, name: str, args: tuple, kwargs: dict, result: Any) -> None:
        super()._see(func, name, args, kwargs, result)
        if not self.counting or name.startswith("c10d::") or _is_copied_header(func):
            return
        written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if any(x.device.type == NAME for x in written):
            self._count(name)
            self.kernels += of_aten(func, name, args, written, _is_backward())

    def _count(self, name: str) -> None:
        key = name, _is_backward()
        self.dispatches[key] = self.dispatches.get(key, 0) + 1


def _is_backward() -> bool:
    return torch._C._current_graph_task_id() >= 0


def _is_copied_header(func: Any) -> bool:
    """Whether no operator was called: torch copies the header of a tensor by itself.

    It does so for `x.data` and for what autograd saved. Tensors with a dispatch mode see that as
    `detach`. The dispatcher has not been there: it would have put autograd's keys aside.
    """
    key = torch._C.DispatchKey.AutogradFunctionality
    return func is _ATEN.detach.default and not torch._C._dispatch_tls_is_dispatch_key_excluded(key)


def of_aten(
    func: Any, name: str, args: tuple, written: list[Tensor], backward: bool
) -> list["Kernel"]:
    """The kernel of one of torch's operators; none of a view, or of one that reserves memory."""
    read = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    if name.startswith(_FREE) or (func.is_view and memory_of(read[0]) == memory_of(written[0])):
        return []  # `contiguous` is a view only where there is nothing to copy
    if name.startswith(("aten::zero", "aten::fill", "aten::full", "aten::ones", "aten::new_")):
        read = []
    elif name == "aten::copy_":
        read = read[1:]
    moved = sum(_size(x) for x in {id(x): x for x in read}.values()) + sum(map(_size, written))
    flops, narrow = 0, True
    if name in _PRODUCTS:
        a, b = [x for x in args if isinstance(x, Tensor)][_PRODUCTS[name] :][:2]
        flops, narrow = 2 * a.numel() * b.shape[-1], a.dtype == torch.bfloat16
    return [Kernel(name.removeprefix("aten::"), moved, flops, narrow, backward=backward)]


class _Inside(TorchDispatchMode):
    """What the code of one of our operators asks torch for."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run one operator and write it down."""
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.names.append(name)
        if any(x.device.type == "meta" for x in written):
            self.kernels += of_aten(func, name, args, written, False)
        return result


def of_operator(func: Any, args: tuple, kwargs: dict) -> tuple[list["Kernel"], list[str]]:
    """Kernels of one of our operators, and the names of torch's operators that it calls.

    The operator's own code runs, on tensors that are only shapes. Launches are not started.
    """
    name = func._schema.name
    args, kwargs = tree_map(_meta, (args, kwargs))
    seen = _Inside()

    def write_down(launch: Launch) -> None:
        seen.kernels.append(_of_launch(launch, name))

    target = SimpleNamespace(get_current_target=lambda: SimpleNamespace(arch=ARCHITECTURE))
    with (
        mock.patch.object(Launch, "run", write_down),
        mock.patch.object(triton.runtime.driver, "_active", target),
        mock.patch.object(torch, "autocast", lambda *a, **k: nullcontext()),  # unknown there
        seen,
    ):
        OPDEFS[name]._init_fn(*args, **kwargs)
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            last = seen.kernels[-1]  # which reads and writes it
            seen.kernels[-1] = replace(last, bytes=last.bytes + _size(value))
    return seen.kernels, seen.names


def _size(x: Tensor) -> int:
    """Bytes of a tensor; those that an expanded one repeats count once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else 1
    return elements * x.element_size()


def _of_launch(launch: Launch, operator: str) -> Kernel:
    tensors = {id(x): x for x in launch.arguments.values() if isinstance(x, Tensor)}
    cell = "mlstm" in operator
    return Kernel(
        launch.name,
        sum(map(_size, tensors.values())),
        mlstm.flops_of(launch) or qkv.flops_of(launch),
        narrow=launch.arguments.get("PRECISION") is None or _is_narrow(launch),
        cell=cell,
    )


def _is_narrow(launch: Launch) -> bool:
    names = "x_qk", "q", "a", "d_h"  # of operands
    read = next(launch.arguments[name] for name in names if name in launch.arguments)
    return read.dtype == torch.bfloat16


def _meta(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def by_name(kernels: list[Kernel]) -> Iterator[tuple[str, list[Kernel]]]:
    """Kernels of one name and one pass together, the slowest first."""
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(kernel.name, []).append(kernel)
    return iter(sorted(groups.items(), key=lambda item: -sum(k.seconds for k in item[1])))
