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

__all__ = ["multihead_norm_triton", "unsupported_reason"]

MOST = 4096  # of a head
ELEMENTS = 2048  # of a tile, or one row
PROGRAMS = 528  # of the backward pass at most, per pass over heads: four for each of 132 processors
SIZES = ["outer", "inner"]  # vary without recompilation


def unsupported_reason(like: Tensor, *, d: int, asked: bool, **facts: object) -> str | None:
    """Why this backend cannot run such a call, with the remedy; None if it can."""
    reason = triton_launch.unsupported_reason(like, asked=asked)
    if reason is None and d > MOST:
        reason = f"a head of {d} exceeds {MOST}; use more heads, or 'torch'"
    return reason


@triton.jit
def tile_at(base, stride_outer, stride_inner, stride_head, o_row, inner, i_head, o_d):
    """Pointers [rows, d] of a tensor [outer, inner, heads, d]; rows count outer * inner."""
    o_base = o_row // inner * stride_outer + o_row % inner * stride_inner + i_head * stride_head
    return base + o_base[:, None] + o_d[None, :]


@triton.jit
def normalised(b_x, m_d, d, eps, CENTERED: tl.constexpr):
    """(x - mean) / deviation of each row, and 1 / deviation; zeros beyond d."""
    if CENTERED:
        b_x = tl.where(m_d[None, :], b_x - (tl.sum(b_x, 1) / d)[:, None], 0.0)
    b_inverse = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) / d + eps)
    return b_x * b_inverse[:, None], b_inverse


@triton.jit
def open_gate(b_gate):
    """Sigmoid, without overflow."""
    b_e = tl.exp(-tl.abs(b_gate))
    return tl.where(b_gate < 0.0, b_e, 1.0) / (1.0 + b_e)


@triton.jit(do_not_specialize=SIZES)
def norm_forward(
    x, weight, gate, y, outer, inner, heads, d, eps,
    stride_xo, stride_xi, stride_xh, stride_go, stride_gi, stride_gh,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one head of y [outer, inner, heads, d]; grid: tiles of rows * heads."""
    i_program = tl.program_id(0).to(tl.int64)
    i_head = i_program % heads
    # [ROWS], [D]
    o_row = i_program // heads * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, D)
    m_d = o_d < d
    # [ROWS, D]
    m_tile = (o_row < outer * inner)[:, None] & m_d[None, :]
    p_x = tile_at(x, stride_xo, stride_xi, stride_xh, o_row, inner, i_head, o_d)
    b_y = tl.load(p_x, mask=m_tile, other=0.0).to(tl.float32)
    b_y, _ = normalised(b_y, m_d, d, eps, CENTERED)
    b_y *= tl.load(weight + i_head * d + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if gate is not None:
        p_gate = tile_at(gate, stride_go, stride_gi, stride_gh, o_row, inner, i_head, o_d)
        b_y *= open_gate(tl.load(p_gate, mask=m_tile, other=0.0).to(tl.float32))
    p_y = y + ((o_row * heads + i_head) * d)[:, None] + o_d[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=[*SIZES, "programs"])
def norm_backward(
    d_y, x, weight, gate, d_x, d_gate, d_weight, programs, outer, inner, heads, d, eps,
    stride_do, stride_di, stride_dh, stride_xo, stride_xi, stride_xh,
    stride_go, stride_gi, stride_gh,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One head in tiles of ROWS rows, dealt out to `programs` programs; grid: programs * heads.

    d_x and d_gate [outer, inner, heads, d] are contiguous; d_weight is float32
    [programs, heads, d].
    """
    i_program = tl.program_id(0).to(tl.int64)
    i_head, i_part = i_program % heads, i_program // heads
    # [D]
    o_d = tl.arange(0, D)
    m_d = o_d < d
    b_w = tl.load(weight + i_head * d + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_dw = tl.zeros([ROWS, D], tl.float32)
    for start in range(i_part * ROWS, outer * inner, programs * ROWS):
        # [ROWS]
        o_row = start + tl.arange(0, ROWS)
        # [ROWS, D]
        m_tile = (o_row < outer * inner)[:, None] & m_d[None, :]
        p_x = tile_at(x, stride_xo, stride_xi, stride_xh, o_row, inner, i_head, o_d)
        b_x = tl.load(p_x, mask=m_tile, other=0.0).to(tl.float32)
        p_dy = tile_at(d_y, stride_do, stride_di, stride_dh, o_row, inner, i_head, o_d)
        b_d = tl.load(p_dy, mask=m_tile, other=0.0).to(tl.float32)
        b_x, b_inverse = normalised(b_x, m_d, d, eps, CENTERED)
        o_out = ((o_row * heads + i_head) * d)[:, None] + o_d[None, :]
        if gate is not None:
            p_gate = tile_at(gate, stride_go, stride_gi, stride_gh, o_row, inner, i_head, o_d)
            b_open = open_gate(tl.load(p_gate, mask=m_tile, other=0.0).to(tl.float32))
            b_d *= b_open  # of the norm's result
            b_dgate = b_d * b_x * b_w * (1.0 - b_open)
            tl.store(d_gate + o_out, b_dgate.to(d_gate.dtype.element_ty), mask=m_tile)
        b_dw += b_d * b_x
        b_d *= b_w
        b_along = tl.sum(b_d * b_x, 1) / d
        if CENTERED:
            b_d -= (tl.sum(b_d, 1) / d)[:, None]
        b_d = (b_d - b_x * b_along[:, None]) * b_inverse[:, None]
        tl.store(d_x + o_out, b_d.to(d_x.dtype.element_ty), mask=m_tile)
    p_dw = d_weight + (i_part * heads + i_head) * d + o_d
    tl.store(p_dw, tl.sum(b_dw, 0), mask=m_d)


def _tile(d: int) -> dict[str, int]:
    whole = max(triton.next_power_of_2(d), 16)
    return {"ROWS": max(ELEMENTS // whole, 1), "D": whole}


def _strides(prefix: str, x: Tensor | None) -> dict[str, int]:
    axes = "oih"
    return {f"stride_{prefix}{a}": 0 if x is None else x.stride(i) for i, a in enumerate(axes)}


def _plan(kernel, arguments: dict, x: Tensor, programs: int) -> Launch:
    outer, inner, heads, d = x.shape
    arguments |= {"outer": outer, "inner": inner, "heads": heads, "d": d}
    tile = _tile(d)
    warps = 8 if tile["D"] > ELEMENTS else 4
    return Launch(kernel.__name__, kernel, (programs * heads,), arguments | tile, warps, 1)


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
    programs = min(most, max(PROGRAMS // heads, 1))
    d_weight = x.new_empty(programs, heads, d, dtype=torch.float32)
    arguments = {"d_y": d_y, "x": x, "weight": weight, "gate": gate, "d_x": d_x, "d_gate": d_gate}
    arguments |= {"d_weight": d_weight, "programs": programs, "eps": eps, "CENTERED": centered}
    arguments |= _strides("d", d_y) | _strides("x", x) | _strides("g", gate)
    return _plan(norm_backward, arguments, x, programs), d_weight


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
    d_y, rows, gate, weight = _readable(d_y), _readable(x), _readable(gate), weight.contiguous()
    launch, d_weight = plan_backward(d_y, rows, weight, gate, d_x, d_gate, eps, centered)
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
    y = _norm(x, weight, gate, eps, kind == "layernorm")
    return y if y.shape == shape else y.view(shape)
