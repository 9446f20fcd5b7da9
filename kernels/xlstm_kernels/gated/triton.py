"""SwiGLU and GeGLU on Triton: one pass over memory forward and one backward.

Nothing but the input is kept: the backward pass computes the activation again. It leaves the result
too where the next operation needs it again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_kernels.common.triton_launch import Launch, run_all, unsupported_reason

__all__ = ["gated_activation_again_triton", "gated_activation_triton", "unsupported_reason"]

COLUMNS = 1024  # of a tile
SIZES = ["tiles"]  # vary without recompilation


@triton.jit
def activate(b_gate, GELU: tl.constexpr):
    """The activation of a float32 tile, and its derivative."""
    if GELU:
        b_share = 0.5 * (1.0 + tl.erf(b_gate * 0.7071067811865476))
        b_density = 0.3989422804014327 * tl.exp(-0.5 * b_gate * b_gate)
        return b_gate * b_share, b_share + b_gate * b_density
    b_e = tl.exp(-tl.abs(b_gate))
    b_share = tl.where(b_gate < 0.0, b_e, 1.0) / (1.0 + b_e)
    return b_gate * b_share, b_share * (1.0 + b_gate * (1.0 - b_share))


@triton.jit(do_not_specialize=SIZES)
def gated_forward(gate_up, out, width, tiles, GELU: tl.constexpr, BW: tl.constexpr):
    """A tile of one row of out [rows, width]; grid rows * tiles."""
    i_program = tl.program_id(0)
    i_row = (i_program // tiles).to(tl.int64)
    # [BW]
    o_w = i_program % tiles * BW + tl.arange(0, BW)
    m_w = o_w < width
    p_gate = gate_up + i_row * 2 * width + o_w
    b_gate = tl.load(p_gate, mask=m_w, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate + width, mask=m_w, other=0.0).to(tl.float32)
    b_active, _ = activate(b_gate, GELU)
    tl.store(out + i_row * width + o_w, (b_active * b_up).to(out.dtype.element_ty), mask=m_w)


@triton.jit(do_not_specialize=SIZES)
def gated_backward(
    d_out, gate_up, d_gate_up, out, width, tiles, GELU: tl.constexpr, BW: tl.constexpr
):
    """A tile of one row of both halves of d_gate_up [rows, 2 * width]; grid rows * tiles.

    `out`, where it is asked for, gets the result of the forward pass. It may be d_out itself.
    """
    i_program = tl.program_id(0)
    i_row = (i_program // tiles).to(tl.int64)
    # [BW]
    o_w = i_program % tiles * BW + tl.arange(0, BW)
    m_w = o_w < width
    o_gate = i_row * 2 * width + o_w
    b_gate = tl.load(gate_up + o_gate, mask=m_w, other=0.0).to(tl.float32)
    b_up = tl.load(gate_up + o_gate + width, mask=m_w, other=0.0).to(tl.float32)
    b_d = tl.load(d_out + i_row * width + o_w, mask=m_w, other=0.0).to(tl.float32)
    b_active, b_slope = activate(b_gate, GELU)
    b_dgate = (b_d * b_up * b_slope).to(d_gate_up.dtype.element_ty)
    tl.store(d_gate_up + o_gate, b_dgate, mask=m_w)
    b_dup = (b_d * b_active).to(d_gate_up.dtype.element_ty)
    tl.store(d_gate_up + o_gate + width, b_dup, mask=m_w)
    if out is not None:
        tl.debug_barrier()  # out may be d_out, which other threads may still have to read
        b_out = (b_active * b_up).to(out.dtype.element_ty)
        tl.store(out + i_row * width + o_w, b_out, mask=m_w)


def _plan(kernel, arguments: dict, rows: int, width: int, gelu: bool) -> Launch:
    block = min(triton.next_power_of_2(width), COLUMNS)
    tiles = triton.cdiv(width, block)
    arguments |= {"width": width, "tiles": tiles, "GELU": gelu, "BW": block}
    return Launch(kernel.__name__, kernel, (rows * tiles,), arguments, 4, 1)


def plan_forward(gate_up: Tensor, out: Tensor, gelu: bool) -> Launch:
    """The forward launch; gate_up [rows, 2 * width] and out [rows, width] are contiguous."""
    return _plan(gated_forward, {"gate_up": gate_up, "out": out}, *out.shape, gelu)


def plan_backward(
    d_out: Tensor, gate_up: Tensor, d_gate_up: Tensor, gelu: bool, out: Tensor | None = None
) -> Launch:
    """The backward launch; all tensors are contiguous."""
    arguments = {"d_out": d_out, "gate_up": gate_up, "d_gate_up": d_gate_up, "out": out}
    return _plan(gated_backward, arguments, *d_out.shape, gelu)


@torch.library.custom_op("xlstm_kernels::gated_triton", mutates_args=())
def _gated(gate_up: Tensor, gelu: bool) -> Tensor:
    """gate_up [rows, 2 * width] -> [rows, width]."""
    rows, both = gate_up.shape
    out = gate_up.new_empty(rows, both // 2)
    run_all([plan_forward(gate_up.contiguous(), out, gelu)], gate_up)
    return out


@_gated.register_fake
def _(gate_up, gelu):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("xlstm_kernels::gated_triton_backward", mutates_args=())
def _backward(d_out: Tensor, gate_up: Tensor, gelu: bool) -> Tensor:
    """The gradient of gate_up, both halves in one tensor."""
    d_gate_up = gate_up.new_empty(gate_up.shape)
    launch = plan_backward(d_out.contiguous(), gate_up.contiguous(), d_gate_up, gelu)
    run_all([launch], gate_up)
    return d_gate_up


@_backward.register_fake
def _(d_out, gate_up, gelu):
    return gate_up.new_empty(gate_up.shape)


@torch.library.custom_op("xlstm_kernels::gated_triton_again", mutates_args=("d_out",))
def _again(d_out: Tensor, gate_up: Tensor, gelu: bool) -> Tensor:
    """The gradient of gate_up. The result of the forward pass takes the place of its gradient."""
    d_gate_up = gate_up.new_empty(gate_up.shape)
    run_all([plan_backward(d_out, gate_up.contiguous(), d_gate_up, gelu, out=d_out)], gate_up)
    return d_gate_up


@_again.register_fake
def _(d_out, gate_up, gelu):
    return gate_up.new_empty(gate_up.shape)


def _save(ctx, inputs, output):
    gate_up, ctx.gelu = inputs
    ctx.save_for_backward(gate_up)


def _differentiate(ctx, d_out):
    return _backward(d_out, *ctx.saved_tensors, ctx.gelu), None


_gated.register_autograd(_differentiate, setup_context=_save)


def gated_activation_triton(gate_up: Tensor, activation: str) -> Tensor:
    """Triton backend of `xlstm_kernels.gated_activation` (checked arguments, same meaning)."""
    *lead, both = gate_up.shape
    if len(lead) == 1:
        return _gated(gate_up, activation == "gelu")
    return _gated(gate_up.reshape(-1, both), activation == "gelu").view(*lead, both // 2)


def gated_activation_again_triton(d_out: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    """See `xlstm_kernels.gated_activation_again`."""
    return _again(d_out, gate_up, activation == "gelu")
