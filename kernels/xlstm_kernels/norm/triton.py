"""Per-head norm on Triton, with the output gate: one pass over memory forward, one backward.

A program has some rows (tokens) of one head whole in registers, so statistics are computed again
backward and nothing but the inputs is kept. Inputs may have any strides with unit stride last, and
come in the layouts of `multihead_norm` without a view for each. The weight's gradient is summed by
each program over its rows and then over programs, in float32 and always in the same order.

Where the rows are a sum, the same pass adds, and the backward pass adds the sum's own gradient. It
leaves the norm too where the next operation needs it again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_kernels.common import triton_launch
from xlstm_kernels.common.triton_launch import Launch, run_all

__all__ = ["multihead_norm_again_triton", "multihead_norm_triton", "unsupported_reason"]

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
    x, added, weight, gate, total, y, outer, inner, heads, d, eps,
    stride_xo, stride_xi, stride_xh, stride_go, stride_gi, stride_gh,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one head of y [outer, inner, heads, d]; grid: tiles of rows * heads.

    The norm is that of x, or with `added` that of total = x + added, which lie as y does.
    """
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
    o_out = ((o_row * heads + i_head) * d)[:, None] + o_d[None, :]
    if added is not None:
        b_y += tl.load(added + o_out, mask=m_tile, other=0.0).to(tl.float32)
        b_total = b_y.to(total.dtype.element_ty)
        tl.store(total + o_out, b_total, mask=m_tile)
        b_y = b_total.to(tl.float32)
    b_y, _ = normalised(b_y, m_d, d, eps, CENTERED)
    b_y *= tl.load(weight + i_head * d + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if gate is not None:
        p_gate = tile_at(gate, stride_go, stride_gi, stride_gh, o_row, inner, i_head, o_d)
        b_y *= open_gate(tl.load(p_gate, mask=m_tile, other=0.0).to(tl.float32))
    tl.store(y + o_out, b_y.to(y.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=[*SIZES, "programs"])
def norm_backward(
    d_y, d_total, x, weight, gate, d_x, d_gate, d_weight, y, programs, outer, inner, heads, d, eps,
    stride_do, stride_di, stride_dh, stride_xo, stride_xi, stride_xh,
    stride_go, stride_gi, stride_gh,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One head in tiles of ROWS rows, dealt out to `programs` programs; grid: programs * heads.

    d_x and d_gate lie as [outer, inner, heads, d]; d_weight is float32 [programs, heads * d].
    d_total, which lies as d_x does, is added to d_x. `y`, where it is asked for, gets the result of
    the forward pass, and lies as it does there. It may be d_y itself if that lies so too.
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
        b_y = b_x * b_w
        if gate is not None:
            p_gate = tile_at(gate, stride_go, stride_gi, stride_gh, o_row, inner, i_head, o_d)
            b_open = open_gate(tl.load(p_gate, mask=m_tile, other=0.0).to(tl.float32))
            b_d *= b_open  # of the norm's result
            b_dgate = b_d * b_x * b_w * (1.0 - b_open)
            b_y *= b_open
            tl.store(d_gate + o_out, b_dgate.to(d_gate.dtype.element_ty), mask=m_tile)
        if y is not None:
            tl.debug_barrier()  # y may be d_y, which other threads may still have to read
            tl.store(y + o_out, b_y.to(y.dtype.element_ty), mask=m_tile)
        b_dw += b_d * b_x
        b_d *= b_w
        b_along = tl.sum(b_d * b_x, 1) / d
        if CENTERED:
            b_d -= (tl.sum(b_d, 1) / d)[:, None]
        b_d = (b_d - b_x * b_along[:, None]) * b_inverse[:, None]
        if d_total is not None:
            b_d += tl.load(d_total + o_out, mask=m_tile, other=0.0).to(tl.float32)
        tl.store(d_x + o_out, b_d.to(d_x.dtype.element_ty), mask=m_tile)
    p_dw = d_weight + (i_part * heads + i_head) * d + o_d
    tl.store(p_dw, tl.sum(b_dw, 0), mask=m_d)


def tile_of(d: int) -> dict[str, int]:
    """Rows of a program, and the power of two that takes d elements of a row."""
    whole = max(triton.next_power_of_2(d), 16)
    return {"ROWS": max(ELEMENTS // whole, 1), "D": whole}


def _shape(x: Tensor, layout: str) -> tuple[int, int, int, int]:
    """(outer, inner, heads, d) of x; see `multihead_norm` for the layouts."""
    if layout == "row":
        return x.numel() // x.shape[-1], 1, 1, x.shape[-1]
    if layout == "by head":
        b, heads, s, d = x.shape
        return s, b, heads, d
    return tuple(x.shape)


def _strides(prefix: str, x: Tensor | None, layout: str) -> dict[str, int]:
    """Strides of x, or of a gate, over outer, inner and heads."""
    if x is None:
        strides = 0, 0, 0
    elif layout == "row":
        strides = x.shape[-1], 0, 0
    elif layout == "by head":
        strides = x.stride(2), x.stride(0), x.stride(1)
    else:
        strides = x.stride()[:3]
    return {f"stride_{prefix}{axis}": one for axis, one in zip("oih", strides, strict=True)}


def _plan(kernel, arguments: dict, x: Tensor, layout: str, programs: int) -> Launch:
    outer, inner, heads, d = _shape(x, layout)
    arguments |= {"outer": outer, "inner": inner, "heads": heads, "d": d}
    tile = tile_of(d)
    warps = 8 if tile["D"] > ELEMENTS else 4
    return Launch(kernel.__name__, kernel, (programs * heads,), arguments | tile, warps, 1)


def plan_forward(
    x, weight, gate, y, eps: float, centered: bool, layout: str = "heads last", added=None,
    total=None,
) -> Launch:  # fmt: skip
    """The forward launch; x and gate have the layout, and the other tensors are contiguous."""
    arguments = {"x": x, "weight": weight, "gate": gate, "y": y, "eps": eps, "CENTERED": centered}
    arguments |= {"added": added, "total": total}
    arguments |= _strides("x", x, layout) | _strides("g", gate, layout)
    outer, inner, _, d = _shape(x, layout)
    return _plan(norm_forward, arguments, x, layout, triton.cdiv(outer * inner, tile_of(d)["ROWS"]))


def plan_backward(
    d_y, x, weight, gate, d_x, d_gate, eps: float, centered: bool, layout: str = "heads last",
    d_total=None, y=None,
):  # fmt: skip
    """The backward launch, and where it leaves the parts [programs, heads * d] of d_weight."""
    outer, inner, heads, d = _shape(x, layout)
    most = triton.cdiv(outer * inner, tile_of(d)["ROWS"])
    programs = min(most, max(PROGRAMS // heads, 1))
    d_weight = x.new_empty(programs, heads * d, dtype=torch.float32)
    arguments = {"d_y": d_y, "x": x, "weight": weight, "gate": gate, "d_x": d_x, "d_gate": d_gate}
    arguments |= {"d_weight": d_weight, "programs": programs, "eps": eps, "CENTERED": centered}
    arguments |= {"d_total": d_total, "y": y}
    if layout == "by head":  # d_y lies as y does
        width = heads * d
        arguments |= {"stride_do": inner * width, "stride_di": width, "stride_dh": d}
    else:
        arguments |= _strides("d", d_y, layout)
    arguments |= _strides("x", x, layout) | _strides("g", gate, layout)
    return _plan(norm_backward, arguments, x, layout, programs), d_weight


def _readable(x: Tensor | None, layout: str) -> Tensor | None:
    """`x`, copied only if the kernels cannot read it where it is."""
    if x is None or (layout != "row" and x.stride(-1) == 1):
        return x
    return x.contiguous()


def _result(x: Tensor, layout: str) -> Tensor:
    """A fresh tensor for y."""
    if layout == "by head":
        s, b, heads, d = _shape(x, layout)
        return x.new_empty(s * b, heads * d)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _gradient(x: Tensor, layout: str) -> Tensor:
    """A fresh tensor for the gradient of x, with d after heads after inner after outer."""
    if layout == "by head":
        b, heads, _, d = x.shape
        strides = heads * d, d, b * heads * d, 1
        return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("xlstm_kernels::multihead_norm_triton", mutates_args=())
def norm_op(
    x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, centered: bool, layout: str
) -> Tensor:
    """The norm of x, gated by the sigmoid of `gate` of that shape."""
    y = _result(x, layout)
    rows, gate = _readable(x, layout), _readable(gate, layout)
    run_all([plan_forward(rows, weight.contiguous(), gate, y, eps, centered, layout)], x)
    return y


@norm_op.register_fake
def _(x, weight, gate, eps, centered, layout):
    return _result(x, layout)


@torch.library.custom_op("xlstm_kernels::multihead_norm_triton_backward", mutates_args=())
def norm_backward_op(
    d_y: Tensor,
    d_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    eps: float,
    centered: bool,
    layout: str,
) -> list[Tensor]:
    """Gradients of x, of the weight (float32), and of the gate if there is one.

    d_total: gradient of x from elsewhere, in the layout "row"; it is added.
    """
    d_x = _gradient(x, layout)
    d_gate = None if gate is None else _gradient(gate, layout)
    d_y = d_y.contiguous() if layout == "by head" else _readable(d_y, layout)
    rows, gate = _readable(x, layout), _readable(gate, layout)
    d_total = None if d_total is None else d_total.contiguous()
    launch, d_weight = plan_backward(
        d_y, rows, weight.contiguous(), gate, d_x, d_gate, eps, centered, layout, d_total
    )
    run_all([launch], x)
    return [d_x, d_weight.sum(0), *([] if d_gate is None else [d_gate])]


@norm_backward_op.register_fake
def _(d_y, d_total, x, weight, gate, eps, centered, layout):
    d_weight = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
    d_gate = [] if gate is None else [_gradient(gate, layout)]
    return [_gradient(x, layout), d_weight, *d_gate]


@torch.library.custom_op("xlstm_kernels::multihead_norm_triton_again", mutates_args=("d_y",))
def _again(
    d_y: Tensor, x: Tensor, weight: Tensor, gate: Tensor, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients as of `norm_backward_op`, by head. The norm takes the place of its gradient."""
    d_x, d_gate = _gradient(x, "by head"), _gradient(gate, "by head")
    rows, gate = _readable(x, "by head"), _readable(gate, "by head")
    launch, d_weight = plan_backward(
        d_y, rows, weight.contiguous(), gate, d_x, d_gate, eps, centered, "by head", y=d_y
    )
    run_all([launch], x)
    return d_x, d_weight.sum(0), d_gate


@_again.register_fake
def _(d_y, x, weight, gate, eps, centered):
    d_weight = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
    return _gradient(x, "by head"), d_weight, _gradient(gate, "by head")


def _save(ctx, inputs, output):
    x, weight, gate, *ctx.options = inputs
    ctx.save_for_backward(x, weight, gate)


def _differentiate(ctx, d_y):
    x, weight, gate = ctx.saved_tensors
    d_x, d_weight, *d_gate = norm_backward_op(d_y, None, x, weight, gate, *ctx.options)
    return d_x, d_weight.to(weight.dtype), *(d_gate or [None]), None, None, None


norm_op.register_autograd(_differentiate, setup_context=_save)


def multihead_norm_triton(
    x: Tensor, weight: Tensor, kind: str, eps: float, gate: Tensor | None, layout: str
) -> Tensor:
    """Triton backend of `xlstm_kernels.multihead_norm` (checked arguments, same meaning)."""
    shape = x.shape
    if layout == "heads last" and x.ndim != 4:  # a view wherever the strides allow it
        lead = (1,) * (4 - x.ndim) if x.ndim < 4 else (-1,)
        shaped = (*lead, *shape) if x.ndim < 4 else (*lead, *shape[-3:])
        x = x.reshape(shaped)
        gate = None if gate is None else gate.reshape(shaped)
    y = norm_op(x, weight, gate, eps, kind == "layernorm", layout)
    return y.view(shape) if layout == "heads last" and y.shape != shape else y


def multihead_norm_again_triton(
    d_y: Tensor, x: Tensor, weight: Tensor, kind: str, eps: float, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `xlstm_kernels.multihead_norm_again`."""
    d_x, d_weight, d_gate = _again(d_y, x, weight, gate, eps, kind == "layernorm")
    return d_x, d_weight.to(weight.dtype), d_gate
