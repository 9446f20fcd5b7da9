"""The norm of each head, with the output gate, on the CPU: one pass forward and one backward."""

import torch
from torch import Tensor

from xlstm_kernels.common.numba import tasks
from xlstm_kernels.common.numba.tasks import readable, run_tasks

PARTS = 32  # of the rows, with a sum of the weight's gradient each


def unsupported_reason(like: Tensor, *, asked: bool, d: int, elements: int) -> str | None:
    """Why this backend cannot run such a call, with the remedy; None if it can."""
    return tasks.unsupported_reason(like, asked=asked, width=d, elements=elements)


@torch.library.custom_op("xlstm_kernels::multihead_norm_numba", mutates_args=())
def _norm(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, centered: bool) -> Tensor:
    """The norm of x [outer, inner, heads, d], gated by the sigmoid of `gate` of that shape."""
    from xlstm_kernels.norm import numba_loops

    outer, inner, heads, d = x.shape
    y = x.new_empty(x.shape)
    x = readable(x)
    other = x if gate is None else readable(gate)
    run_tasks(
        numba_loops.forward, outer * inner, inner, heads, d, eps, centered, gate is not None,
        x.stride()[:3], other.stride()[:3], x, weight.float().contiguous(), other, y,
    )  # fmt: skip
    return y


@_norm.register_fake
def _(x, weight, gate, eps, centered):
    return x.new_empty(x.shape)


@torch.library.custom_op("xlstm_kernels::multihead_norm_numba_backward", mutates_args=())
def _backward(
    d_y: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the weight and of the gate (empty without one)."""
    from xlstm_kernels.norm import numba_loops

    outer, inner, heads, d = x.shape
    d_weight = x.new_empty(PARTS, heads * d)
    d_gate = x.new_empty(0 if gate is None else x.shape)
    d_y, x = readable(d_y), readable(x)
    d_x = torch.empty_like(x)  # as x lies: cells take their gradient by head, without a copy
    other = x if gate is None else readable(gate)
    run_tasks(
        numba_loops.backward, PARTS, PARTS, outer * inner, inner, heads, d, eps, centered,
        gate is not None, d_y.stride()[:3], x.stride()[:3], other.stride()[:3], d_x.stride()[:3],
        d_y, x, weight.float().contiguous(), other, d_x, d_x if gate is None else d_gate, d_weight,
    )  # fmt: skip
    return d_x, d_weight.sum(0), d_gate


@_backward.register_fake
def _(d_y, x, weight, gate, eps, centered):
    d_gate = x.new_empty(0 if gate is None else x.shape)
    return torch.empty_like(readable(x)), x.new_empty(weight.shape), d_gate


def _save(ctx, inputs, output):
    x, weight, gate, *ctx.options = inputs
    ctx.save_for_backward(x, weight, gate)


def _differentiate(ctx, d_y):
    x, weight, gate = ctx.saved_tensors
    d_x, d_weight, d_gate = _backward(d_y, x, weight, gate, *ctx.options)
    return d_x, d_weight, None if gate is None else d_gate, None, None


_norm.register_autograd(_differentiate, setup_context=_save)


def multihead_norm_numba(
    x: Tensor, weight: Tensor, kind: str, eps: float, gate: Tensor | None
) -> Tensor:
    """Numba backend of `xlstm_kernels.multihead_norm` (checked arguments, same meaning)."""
    shape = x.shape
    shaped = (1,) * (4 - x.ndim) + tuple(shape) if x.ndim < 4 else (-1, *shape[-3:])
    gate = None if gate is None else gate.reshape(shaped)
    y = _norm(x.reshape(shaped), weight, gate, eps, kind == "layernorm")
    return y.view(shape)
