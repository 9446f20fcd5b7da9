"""Per-head norm on Triton, with the output gate: one pass over memory forward, one backward.

A program has some rows (tokens) of one head whole in registers, so statistics are computed again
backward and nothing but the inputs is kept. Inputs may have any strides with unit stride last: the
7B-style block hands over [b, heads, s, d] as [s, b, heads, d]. The weight's gradient is summed by
each program over its rows and then over programs, in float32 and always in the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_kernels.common import triton_launch
from xlstm_kernels.common.triton_launch import Launch, run_all

__all__ = ["multihead_norm_triton", "refusal"]

MOST = 4096  # of a head
ELEMENTS = 2048  # of a tile, or one row
PROGRAMS = 528  # of the backward pass at most, per pass over heads: four for each of 132 processors
SIZES = ["outer", "inner"]  # vary without recompilation


def refusal(like: Tensor, *, d: int, asked: bool) -> str | None:
    """Why this backend cannot run such a call, with the remedy; None if it can."""
    reason = triton_launch.refusal(like, asked=asked)
    if reason is None and d > MOST:
        reason = f"a head of {d} exceeds {MOST}; use more heads, or 'torch'"
    return reason


@triton.jit
def tile_at(base, stride_outer, stride_inner, stride_head, row, inner, head, column):
    """Pointers [rows, d] of a tensor [outer, inner, heads, d]; rows count outer * inner."""
    at = row // inner * stride_outer + row % inner * stride_inner + head * stride_head
    return base + at[:, None] + column[None, :]


@triton.jit
def normalised(x, inside, d, eps, CENTERED: tl.constexpr):
    """(x - mean) / deviation of each row, and 1 / deviation; zeros beyond d."""
    if CENTERED:
        x = tl.where(inside[None, :], x - (tl.sum(x, 1) / d)[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / d + eps)
    return x * inverse[:, None], inverse


@triton.jit
def open_gate(gate):
    """Sigmoid, without overflow."""
    e = tl.exp(-tl.abs(gate))
    return tl.where(gate < 0.0, e, 1.0) / (1.0 + e)


@triton.jit(do_not_specialize=SIZES)
def norm_forward(
    x, weight, gate, y, outer, inner, heads, d, eps,
    stride_xo, stride_xi, stride_xh, stride_go, stride_gi, stride_gh,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one head of y [outer, inner, heads, d]; grid: blocks of rows * heads."""
    pid = tl.program_id(0).to(tl.int64)
    head = pid % heads
    row = pid // heads * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D)
    inside = column < d
    mask = (row < outer * inner)[:, None] & inside[None, :]
    xp = tile_at(x, stride_xo, stride_xi, stride_xh, row, inner, head, column)
    value = tl.load(xp, mask=mask, other=0.0).to(tl.float32)
    value, _ = normalised(value, inside, d, eps, CENTERED)
    value *= tl.load(weight + head * d + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if gate is not None:
        gp = tile_at(gate, stride_go, stride_gi, stride_gh, row, inner, head, column)
        value *= open_gate(tl.load(gp, mask=mask, other=0.0).to(tl.float32))
    yp = y + ((row * heads + head) * d)[:, None] + column[None, :]
    tl.store(yp, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, "blocks"])
def norm_backward(
    d_y, x, weight, gate, d_x, d_gate, d_weight, blocks, outer, inner, heads, d, eps,
    stride_do, stride_di, stride_dh, stride_xo, stride_xi, stride_xh,
    stride_go, stride_gi, stride_gh,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Every blocks-th block of rows of one head; grid: blocks * heads.

    d_x and d_gate [outer, inner, heads, d] are contiguous; d_weight is float32 [blocks, heads, d].
    """
    pid = tl.program_id(0).to(tl.int64)
    head, block = pid % heads, pid // heads
    column = tl.arange(0, D)
    inside = column < d
    w = tl.load(weight + head * d + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, D], tl.float32)
    for start in range(block * ROWS, outer * inner, blocks * ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < outer * inner)[:, None] & inside[None, :]
        xp = tile_at(x, stride_xo, stride_xi, stride_xh, row, inner, head, column)
        value = tl.load(xp, mask=mask, other=0.0).to(tl.float32)
        dp = tile_at(d_y, stride_do, stride_di, stride_dh, row, inner, head, column)
        grad = tl.load(dp, mask=mask, other=0.0).to(tl.float32)
        value, inverse = normalised(value, inside, d, eps, CENTERED)
        at = ((row * heads + head) * d)[:, None] + column[None, :]
        if gate is not None:
            gp = tile_at(gate, stride_go, stride_gi, stride_gh, row, inner, head, column)
            opened = open_gate(tl.load(gp, mask=mask, other=0.0).to(tl.float32))
            grad *= opened  # of the norm's result
            d_opened = grad * value * w * (1.0 - opened)
            tl.store(d_gate + at, d_opened.to(d_gate.dtype.element_ty), mask=mask)
        total += grad * value
        grad *= w
        along = tl.sum(grad * value, 1) / d
        if CENTERED:
            grad -= (tl.sum(grad, 1) / d)[:, None]
        grad = (grad - value * along[:, None]) * inverse[:, None]
        tl.store(d_x + at, grad.to(d_x.dtype.element_ty), mask=mask)
    tl.store(d_weight + (block * heads + head) * d + column, tl.sum(total, 0), mask=inside)


def _tile(d: int) -> dict[str, int]:
    whole = max(triton.next_power_of_2(d), 16)
    return {"ROWS": max(ELEMENTS // whole, 1), "D": whole}


def _strides(prefix: str, x: Tensor | None) -> dict[str, int]:
    axes = "oih"
    return {f"stride_{prefix}{a}": 0 if x is None else x.stride(i) for i, a in enumerate(axes)}


def _plan(kernel, arguments: dict, x: Tensor, blocks: int) -> Launch:
    outer, inner, heads, d = x.shape
    arguments |= {"outer": outer, "inner": inner, "heads": heads, "d": d}
    tile = _tile(d)
    warps = 8 if tile["D"] > ELEMENTS else 4
    return Launch(kernel.__name__, kernel, (blocks * heads,), arguments | tile, warps, 1)


def plan_forward(x, weight, gate, y, eps: float, centered: bool) -> Launch:
    """The forward launch; x, gate and y are [outer, inner, heads, d]."""
    arguments = {"x": x, "weight": weight, "gate": gate, "y": y, "eps": eps, "CENTERED": centered}
    arguments |= _strides("x", x) | _strides("g", gate)
    rows = x.shape[0] * x.shape[1]
    return _plan(norm_forward, arguments, x, triton.cdiv(rows, _tile(x.shape[3])["ROWS"]))


def plan_backward(d_y, x, weight, gate, d_x, d_gate, eps: float, centered: bool):
    """The backward launch, and where it leaves the parts of the weight's gradient."""
    outer, inner, heads, d = x.shape
    most = triton.cdiv(outer * inner, _tile(d)["ROWS"])
    blocks = min(most, max(PROGRAMS // heads, 1))
    d_weight = x.new_empty(blocks, heads, d, dtype=torch.float32)
    arguments = {
        "d_y": d_y, "x": x, "weight": weight, "gate": gate, "d_x": d_x, "d_gate": d_gate,
        "d_weight": d_weight, "blocks": blocks, "eps": eps, "CENTERED": centered,
    }  # fmt: skip
    arguments |= _strides("d", d_y) | _strides("x", x) | _strides("g", gate)
    return _plan(norm_backward, arguments, x, blocks), d_weight


def _readable(x: Tensor | None) -> Tensor | None:
    """`x` [outer, inner, heads, d] with unit stride last, copied only if it has none."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("xlstm_kernels::multihead_norm_triton", mutates_args=())
def _norm(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, centered: bool) -> Tensor:
    """The norm of x [outer, inner, heads, d], gated by the sigmoid of `gate` of that shape."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch = plan_forward(_readable(x), weight.contiguous(), _readable(gate), y, eps, centered)
    run_all([launch], x)
    return y


@_norm.register_fake
def _(x, weight, gate, eps, centered):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("xlstm_kernels::multihead_norm_triton_backward", mutates_args=())
def _backward(
    d_y: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the weight (float32) and of the gate (empty without one)."""
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_gate = None if gate is None else torch.empty(x.shape, dtype=gate.dtype, device=x.device)
    launch, d_weight = plan_backward(
        _readable(d_y), _readable(x), weight.contiguous(), _readable(gate), d_x, d_gate, eps,
        centered,
    )  # fmt: skip
    run_all([launch], x)
    return d_x, d_weight.sum(0).flatten(), x.new_empty(0) if d_gate is None else d_gate


@_backward.register_fake
def _(d_y, x, weight, gate, eps, centered):
    new = {"device": x.device}
    d_gate = x.new_empty(0) if gate is None else torch.empty(x.shape, dtype=gate.dtype, **new)
    d_weight = torch.empty(weight.shape, dtype=torch.float32, **new)
    return torch.empty(x.shape, dtype=x.dtype, **new), d_weight, d_gate


def _save(ctx, inputs, output):
    x, weight, gate, *ctx.options = inputs
    ctx.save_for_backward(x, weight, gate)


def _differentiate(ctx, d_y):
    x, weight, gate = ctx.saved_tensors
    d_x, d_weight, d_gate = _backward(d_y, x, weight, gate, *ctx.options)
    return d_x, d_weight.to(weight.dtype), None if gate is None else d_gate, None, None


_norm.register_autograd(_differentiate, setup_context=_save)


def multihead_norm_triton(
    x: Tensor, weight: Tensor, kind: str, eps: float, gate: Tensor | None
) -> Tensor:
    """Triton backend of `xlstm_kernels.multihead_norm` (checked arguments, same meaning)."""
    shape = x.shape
    if x.ndim != 4:  # a view wherever the strides allow it
        lead = (1,) * (4 - x.ndim) if x.ndim < 4 else (-1,)
        shaped = (*lead, *shape) if x.ndim < 4 else (*lead, *shape[-3:])
        x = x.reshape(shaped)
        gate = None if gate is None else gate.reshape(shaped)
    return _norm(x, weight, gate, eps, kind == "layernorm").view(shape)
