"""What every operator of a training step reads, writes and computes, on tensors without data.

The engine that trains runs on the device that does not exist (`pretrain.rehearsal`). Each operator
that reaches the device is written down with its bytes, operations and launches. An operator of
`xlstm_kernels` is taken apart into the launches that it would plan. A tensor counts once where it
is read and once where it is written: caches help within a kernel and not between kernels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.device_limits import BANDWIDTH, BF16_PRODUCTS, CELL_FACTOR, FP32_PRODUCTS
from benchmarks.kernel_variants.mlstm import flops_of
from pretrain.rehearsal.device import NAME, RehearsalMode
from pretrain.rehearsal.record import RankRecord
from xlstm_kernels.common.triton_launch import Launch
from xlstm_kernels.cross_entropy import triton as cross_entropy
from xlstm_kernels.gated import triton as gated
from xlstm_kernels.mlstm.arguments import Inputs
from xlstm_kernels.mlstm.triton import buffers, launches, tiles
from xlstm_kernels.norm import triton as norm

TARGET = "sm_90"
_ATEN = torch.ops.aten
_FREE = ("aten::detach", "aten::empty", "aten::lift_fresh", "aten::new_empty", "aten::_unsafe_view")
_PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}


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
        dispatches: operators that reached the device, views included.
    """

    def __init__(self) -> None:
        super().__init__(RankRecord(0))
        self.kernels: list[Kernel] = []
        self.dispatches = 0
        self.counting = False

    def _see(self, func: Any, name: str, args: tuple, kwargs: dict, result: Any) -> None:
        super()._see(func, name, args, kwargs, result)
        if not self.counting or name.startswith("c10d::"):
            return
        written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        seen = tree_leaves(args) if name in _PLANS else written
        seen = [x for x in seen if isinstance(x, Tensor)]
        if not any(x.device.type == NAME for x in seen):
            return
        self.dispatches += 1
        if func.is_view or name.startswith(_FREE):
            return
        backward = torch._C._current_graph_task_id() >= 0
        if name in _PLANS:
            with torch._C._DisableTorchDispatch():
                for launch in _PLANS[name](*args, **kwargs):
                    self.kernels.append(_of_launch(launch, name, backward))
            return
        read = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        if name.startswith(("aten::zero", "aten::fill", "aten::full", "aten::ones", "aten::new_")):
            read = []
        elif name == "aten::copy_":
            read = read[1:]
        moved = sum(_size(x) for x in {id(x): x for x in read}.values()) + sum(map(_size, written))
        flops, narrow = 0, True
        if name in _PRODUCTS:
            a, b = [x for x in args if isinstance(x, Tensor)][_PRODUCTS[name] :][:2]
            flops, narrow = 2 * a.numel() * b.shape[-1], a.dtype == torch.bfloat16
        self.kernels.append(
            Kernel(name.removeprefix("aten::"), moved, flops, narrow, backward=backward)
        )


def _size(x: Tensor) -> int:
    """Bytes of a tensor; those that an expanded one repeats count once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else 1
    return elements * x.element_size()


def _of_launch(launch: Launch, operator: str, backward: bool) -> Kernel:
    tensors = {id(x): x for x in launch.arguments.values() if isinstance(x, Tensor)}
    cell = "mlstm" in operator
    return Kernel(
        launch.name,
        sum(map(_size, tensors.values())),
        flops_of(launch) if cell else 0,
        narrow=launch.arguments.get("PRECISION") is None or _is_narrow(launch),
        cell=cell,
        backward=backward,
    )


def _is_narrow(launch: Launch) -> bool:
    return launch.arguments.get("q", launch.arguments.get("a")).dtype == torch.bfloat16


def _meta(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _mlstm_options(
    q: Tensor, v: Tensor, chunk_size, exp_gate, normalize, eps, bf16_states, soft_cap, given
) -> buffers.Options:
    table = tiles.mlstm_config(TARGET, q.shape[-1], v.shape[-1], q.dtype, chunk_size, bf16_states)
    return buffers.Options(
        chunk_size, exp_gate, normalize, eps, bf16_states, "tf32x3", table, soft_cap
    )  # fmt: skip


def _mlstm_forward(
    q, k, v, i, f, C, n, m, boundaries, need_last, *options, **named
) -> list[Launch]:
    inputs = Inputs(*map(_meta, (q, k, v, i, f)))
    chosen = _mlstm_options(q, v, *options, *named.values())
    state = tuple(map(_meta, (C, n, m)))
    return launches.plan_forward(inputs, state, _meta(boundaries), chosen, need_last)[3]


def _mlstm_backward(q, k, v, i, f, h, saved, d_h, d_C, d_n, *options, **named) -> list[Launch]:
    inputs = Inputs(*map(_meta, (q, k, v, i, f)))
    chosen = _mlstm_options(q, v, *options, *named.values())
    kept = buffers.Saved(*map(_meta, saved))
    last = _meta(d_C), _meta(d_n)
    return launches.plan_backward(inputs, _meta(h), _meta(d_h), last, kept, chosen)[1]


def _norm_forward(x, weight, gate, eps, centered) -> list[Launch]:
    y = torch.empty(x.shape, dtype=x.dtype, device="meta")
    return [norm.plan_forward(_meta(x), _meta(weight), _meta(gate), y, eps, centered)]


def _norm_backward(d_y, x, weight, gate, eps, centered) -> list[Launch]:
    new = torch.empty(x.shape, dtype=x.dtype, device="meta")
    d_gate = None if gate is None else torch.empty_like(new)
    given = (_meta(t) for t in (d_y, x, weight, gate))
    launch, parts = norm.plan_backward(*given, new, d_gate, eps, centered)
    total = {"parts": parts, "sum": torch.empty(parts.shape[1:], device="meta")}
    return [launch, Launch("sum of weight gradients", None, (1,), total, 4, 1)]


def _gated_forward(gate_up, gelu) -> list[Launch]:
    rows, both = gate_up.shape
    out = torch.empty(rows, both // 2, dtype=gate_up.dtype, device="meta")
    return [gated.plan_forward(_meta(gate_up), out, gelu)]


def _gated_backward(d_out, gate_up, gelu) -> list[Launch]:
    return [gated.plan_backward(_meta(d_out), _meta(gate_up), _meta(gate_up), gelu)]


def _statistics(logits, labels, cap) -> list[Launch]:
    out = tuple(torch.empty(len(logits), device="meta") for _ in range(3))
    return [cross_entropy.plan_statistics(_meta(logits), _meta(labels), out, cap)]


def _gradient(logits, labels, log_total, grad, cap) -> list[Launch]:
    # Read and written: once more than a launch that names its tensors once.
    launch = cross_entropy.plan_gradient(*map(_meta, (logits, labels, log_total, grad)), cap)
    launch.arguments["written"] = _meta(logits)
    return [launch]


# Operator -> the launches that it plans, from its own arguments.
_PLANS: dict[str, Callable[..., list[Launch]]] = {
    "xlstm_kernels::mlstm_forward": _mlstm_forward,
    "xlstm_kernels::mlstm_backward": _mlstm_backward,
    "xlstm_kernels::multihead_norm_triton": _norm_forward,
    "xlstm_kernels::multihead_norm_triton_backward": _norm_backward,
    "xlstm_kernels::gated_triton": _gated_forward,
    "xlstm_kernels::gated_triton_backward": _gated_backward,
    "xlstm_kernels::softmax_statistics_triton": _statistics,
    "xlstm_kernels::softmax_gradient_triton": _gradient,
}


def by_name(kernels: list[Kernel]) -> Iterator[tuple[str, list[Kernel]]]:
    """Kernels of one name and one pass together, the slowest first."""
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(kernel.name, []).append(kernel)
    return iter(sorted(groups.items(), key=lambda item: -sum(k.seconds for k in item[1])))
