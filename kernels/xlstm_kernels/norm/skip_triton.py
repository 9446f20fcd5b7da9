"""Norm of each head, skip and gate of the classic mLSTM block on Triton: one pass each way.

As in `triton`, a program has some tokens of one head whole in registers, statistics are computed
again backward, and nothing but the inputs is kept. Gradients of the weights are summed by each
program over its tokens and then over programs, in float32 and always in the same order. The
backward pass leaves the result too where the next operation needs it again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_kernels.common.triton_launch import Launch, run_all
from xlstm_kernels.norm.triton import PROGRAMS, SIZES, normalised, open_gate, tile_at

__all__ = ["norm_gated_skip_again_triton", "norm_gated_skip_triton"]

ELEMENTS = 1024  # of a tile, or one row: half of what a norm alone takes in its registers


@triton.jit(do_not_specialize=SIZES)
def norm_skip_forward(
    h, weight, skip, x, gate, y, outer, inner, heads, d, eps,
    stride_ho, stride_hi, stride_hh, stride_xo, stride_xi, stride_go, stride_gi,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one head of y [outer, inner, heads * d]; grid: tiles of tokens * heads."""
    i_program = tl.program_id(0).to(tl.int64)
    i_head = i_program % heads
    # [ROWS], [D]
    o_row = i_program // heads * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, D)
    m_d = o_d < d
    # [ROWS, D]
    m_tile = (o_row < outer * inner)[:, None] & m_d[None, :]
    p_h = tile_at(h, stride_ho, stride_hi, stride_hh, o_row, inner, i_head, o_d)
    b_y = tl.load(p_h, mask=m_tile, other=0.0).to(tl.float32)
    b_y, _ = normalised(b_y, m_d, d, eps, CENTERED)
    b_y *= tl.load(weight + i_head * d + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    p_x = tile_at(x, stride_xo, stride_xi, d, o_row, inner, i_head, o_d)
    b_skip = tl.load(skip + i_head * d + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_y += b_skip[None, :] * tl.load(p_x, mask=m_tile, other=0.0).to(tl.float32)
    p_gate = tile_at(gate, stride_go, stride_gi, d, o_row, inner, i_head, o_d)
    b_gate = tl.load(p_gate, mask=m_tile, other=0.0).to(tl.float32)
    b_y *= b_gate * open_gate(b_gate)
    p_y = y + ((o_row * heads + i_head) * d)[:, None] + o_d[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=[*SIZES, "programs"])
def norm_skip_backward(
    d_y, h, weight, skip, x, gate, d_h, d_x, d_gate, d_weight, d_skip, y, programs,
    outer, inner, heads, d, eps,
    stride_do, stride_di, stride_ho, stride_hi, stride_hh,
    stride_xo, stride_xi, stride_go, stride_gi,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One head in tiles of ROWS tokens, dealt out to `programs` programs; grid: programs * heads.

    d_h, d_x and d_gate lie as [outer, inner, heads, d]; d_weight and d_skip are float32
    [programs, heads * d]. `y`, where it is asked for, gets the result of the forward pass, and lies
    as it does there. It may be d_y itself if that lies so too.
    """
    i_program = tl.program_id(0).to(tl.int64)
    i_head, i_part = i_program % heads, i_program // heads
    # [D]
    o_d = tl.arange(0, D)
    m_d = o_d < d
    b_w = tl.load(weight + i_head * d + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_skip = tl.load(skip + i_head * d + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_dw = tl.zeros([ROWS, D], tl.float32)
    b_dskip = tl.zeros([ROWS, D], tl.float32)
    for start in range(i_part * ROWS, outer * inner, programs * ROWS):
        # [ROWS]
        o_row = start + tl.arange(0, ROWS)
        # [ROWS, D]
        m_tile = (o_row < outer * inner)[:, None] & m_d[None, :]
        p_h = tile_at(h, stride_ho, stride_hi, stride_hh, o_row, inner, i_head, o_d)
        b_h = tl.load(p_h, mask=m_tile, other=0.0).to(tl.float32)
        p_dy = tile_at(d_y, stride_do, stride_di, d, o_row, inner, i_head, o_d)
        b_d = tl.load(p_dy, mask=m_tile, other=0.0).to(tl.float32)
        p_x = tile_at(x, stride_xo, stride_xi, d, o_row, inner, i_head, o_d)
        b_x = tl.load(p_x, mask=m_tile, other=0.0).to(tl.float32)
        p_gate = tile_at(gate, stride_go, stride_gi, d, o_row, inner, i_head, o_d)
        b_gate = tl.load(p_gate, mask=m_tile, other=0.0).to(tl.float32)
        b_h, b_inverse = normalised(b_h, m_d, d, eps, CENTERED)
        b_open = open_gate(b_gate)
        b_sum = b_h * b_w + b_skip * b_x
        b_dgate = b_d * b_sum * b_open * (1.0 + b_gate * (1.0 - b_open))
        o_out = ((o_row * heads + i_head) * d)[:, None] + o_d[None, :]
        if y is not None:
            tl.debug_barrier()  # y may be d_y, which other threads may still have to read
            b_y = b_sum * (b_gate * b_open)
            tl.store(y + o_out, b_y.to(y.dtype.element_ty), mask=m_tile)
        b_d *= b_gate * b_open  # of the sum
        tl.store(d_gate + o_out, b_dgate.to(d_gate.dtype.element_ty), mask=m_tile)
        tl.store(d_x + o_out, (b_d * b_skip).to(d_x.dtype.element_ty), mask=m_tile)
        b_dskip += b_d * b_x
        b_dw += b_d * b_h
        b_d *= b_w
        b_along = tl.sum(b_d * b_h, 1) / d
        if CENTERED:
            b_d -= (tl.sum(b_d, 1) / d)[:, None]
        b_d = (b_d - b_h * b_along[:, None]) * b_inverse[:, None]
        tl.store(d_h + o_out, b_d.to(d_h.dtype.element_ty), mask=m_tile)
    o_part = (i_part * heads + i_head) * d + o_d
    tl.store(d_weight + o_part, tl.sum(b_dw, 0), mask=m_d)
    tl.store(d_skip + o_part, tl.sum(b_dskip, 0), mask=m_d)


def tile_of(d: int) -> dict[str, int]:
    """Rows of a program, and the power of two that takes d elements of a row."""
    whole = max(triton.next_power_of_2(d), 16)
    return {"ROWS": max(ELEMENTS // whole, 1), "D": whole}


def _plan(kernel, arguments: dict, h: Tensor, x: Tensor, gate: Tensor, programs: int) -> Launch:
    inner, heads, outer, d = h.shape
    arguments |= {"outer": outer, "inner": inner, "heads": heads, "d": d}
    arguments |= {"stride_ho": h.stride(2), "stride_hi": h.stride(0), "stride_hh": h.stride(1)}
    arguments |= {"stride_xo": x.stride(0), "stride_xi": x.stride(1)}
    arguments |= {"stride_go": gate.stride(0), "stride_gi": gate.stride(1)}
    tile = tile_of(d)
    warps = 8 if tile["D"] > ELEMENTS else 4
    return Launch(kernel.__name__, kernel, (programs * heads,), arguments | tile, warps, 1)


def plan_forward(h, weight, skip, x, gate, y, eps: float, centered: bool) -> Launch:
    """The forward launch; h [b, heads, s, d], x and gate [s, b, heads * d], y likewise, dense."""
    arguments = {"h": h, "weight": weight, "skip": skip, "x": x, "gate": gate, "y": y}
    arguments |= {"eps": eps, "CENTERED": centered}
    b, _, s, d = h.shape
    return _plan(norm_skip_forward, arguments, h, x, gate, triton.cdiv(s * b, tile_of(d)["ROWS"]))


def plan_backward(
    d_y, h, weight, skip, x, gate, d_h, d_x, d_gate, eps: float, centered: bool, y=None
) -> tuple[Launch, Tensor]:
    """The backward launch, and where it leaves parts of the gradients of weight and skip.

    These are [2, programs, heads * d]. d_h, d_x and d_gate lie as [s, b, heads, d].
    """
    b, heads, s, d = h.shape
    programs = min(triton.cdiv(s * b, tile_of(d)["ROWS"]), max(PROGRAMS // heads, 1))
    sums = h.new_empty(2, programs, heads * d, dtype=torch.float32)
    arguments = {"d_y": d_y, "h": h, "weight": weight, "skip": skip, "x": x, "gate": gate}
    arguments |= {"d_h": d_h, "d_x": d_x, "d_gate": d_gate, "d_weight": sums[0], "y": y}
    arguments |= {"d_skip": sums[1], "programs": programs, "eps": eps, "CENTERED": centered}
    arguments |= {"stride_do": d_y.stride(0), "stride_di": d_y.stride(1)}
    return _plan(norm_skip_backward, arguments, h, x, gate, programs), sums


def _readable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied only where a kernel cannot read them as they lie."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


@torch.library.custom_op("xlstm_kernels::norm_gated_skip_triton", mutates_args=())
def _norm_skip(
    h: Tensor, weight: Tensor, skip: Tensor, x: Tensor, gate: Tensor, eps: float, centered: bool
) -> Tensor:
    """The norm of h with skip and gate; see `norm_gated_skip`."""
    y = x.new_empty(x.shape, dtype=h.dtype)
    inputs = _readable(h, weight, skip, x, gate)
    run_all([plan_forward(*inputs, y, eps, centered)], h)
    return y


@_norm_skip.register_fake
def _(h, weight, skip, x, gate, eps, centered):
    return x.new_empty(x.shape, dtype=h.dtype)


@torch.library.custom_op("xlstm_kernels::norm_gated_skip_triton_backward", mutates_args=())
def _backward(
    d_y: Tensor,
    h: Tensor,
    weight: Tensor,
    skip: Tensor,
    x: Tensor,
    gate: Tensor,
    eps: float,
    centered: bool,
) -> list[Tensor]:
    """Gradients of h, x and gate, and float32 [2, width] of weight and skip."""
    d_h, d_x, d_gate = _gradients(h, x, gate)
    inputs = _readable(d_y, h, weight, skip, x, gate)
    launch, sums = plan_backward(*inputs, d_h, d_x, d_gate, eps, centered)
    run_all([launch], h)
    return [d_h, d_x, d_gate, sums.sum(1)]


def _gradients(h: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh tensors for the gradients of h, x and gate, which all lie as x does."""
    b, heads, s, d = h.shape
    d_h, d_x, d_gate = (x.new_empty(s, b, heads * d, dtype=one.dtype) for one in (h, x, gate))
    return d_h.view(s, b, heads, d).permute(1, 2, 0, 3), d_x, d_gate


@_backward.register_fake
def _(d_y, h, weight, skip, x, gate, eps, centered):
    return [*_gradients(h, x, gate), weight.new_empty(2, len(weight), dtype=torch.float32)]


@torch.library.custom_op("xlstm_kernels::norm_gated_skip_triton_again", mutates_args=("d_y",))
def _again(
    d_y: Tensor,
    h: Tensor,
    weight: Tensor,
    skip: Tensor,
    x: Tensor,
    gate: Tensor,
    eps: float,
    centered: bool,
) -> list[Tensor]:
    """Gradients as of `_backward`. The result takes the place of its gradient, which is dense."""
    grads = _gradients(h, x, gate)
    launch, sums = plan_backward(
        d_y, *_readable(h, weight, skip, x, gate), *grads, eps, centered, y=d_y
    )
    run_all([launch], h)
    return [*grads, sums.sum(1)]


@_again.register_fake
def _(d_y, h, weight, skip, x, gate, eps, centered):
    return [*_gradients(h, x, gate), weight.new_empty(2, len(weight), dtype=torch.float32)]


def _save(ctx, inputs, output):
    *tensors, eps, centered = inputs
    ctx.options = eps, centered
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, d_y):
    d_h, d_x, d_gate, sums = _backward(d_y, *ctx.saved_tensors, *ctx.options)
    d_weight, d_skip = sums.to(ctx.saved_tensors[1].dtype)
    return d_h, d_weight, d_skip, d_x, d_gate, None, None


_norm_skip.register_autograd(_differentiate, setup_context=_save)


def norm_gated_skip_triton(
    h: Tensor, weight: Tensor, kind: str, eps: float, skip: Tensor, x: Tensor, gate: Tensor
) -> Tensor:
    """Triton backend of `xlstm_kernels.norm_gated_skip` (checked arguments, same meaning)."""
    return _norm_skip(h, weight, skip, x, gate, eps, kind == "layernorm")


def norm_gated_skip_again_triton(
    d_y: Tensor,
    h: Tensor,
    weight: Tensor,
    kind: str,
    eps: float,
    skip: Tensor,
    x: Tensor,
    gate: Tensor,
) -> tuple[Tensor, ...]:
    """See `xlstm_kernels.norm_gated_skip_again`."""
    inputs = d_y, h, weight, skip, x, gate
    d_h, d_x, d_gate, sums = _again(*inputs, eps, kind == "layernorm")
    d_weight, d_skip = sums.to(weight.dtype)
    return d_h, d_weight, d_skip, d_x, d_gate
