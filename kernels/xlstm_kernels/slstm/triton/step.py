"""The sLSTM for one token on Triton: a program has some columns of one head, updated in place.

Every program of a head reads all of h, so the new h goes to memory of its own and replaces the old
one afterwards; a head of a single tile needs neither. Nothing depends on values: a GPU graph can
capture it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_kernels.common.triton_launch import Launch, architecture, run_all
from xlstm_kernels.slstm.triton.cell import cell, load_wide
from xlstm_kernels.slstm.triton.kernels import recurrent_sums
from xlstm_kernels.slstm.triton.scan import BATCH, MOST, Tiles, tiles_for, unsupported_reason

__all__ = ["slstm_step_triton", "unsupported_reason"]


@triton.jit(do_not_specialize=["batch"])
def one_step(
    preacts, weight, bias, h, h_next, c, n, m, out, batch, heads, d, tiles,
    SIGMOID: tl.constexpr, PRECISION: tl.constexpr, BATCH: tl.constexpr, WIDTH: tl.constexpr,
    INNER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """WIDTH columns of a head and BATCH rows; grid: blocks of rows * heads * tiles."""
    i_program = tl.program_id(0).to(tl.int64)
    i_tile, i_head = i_program % tiles, i_program // tiles % heads
    # [BATCH], [WIDTH]
    o_row = i_program // tiles // heads * BATCH + tl.arange(0, BATCH)
    o_column = i_tile * WIDTH + tl.arange(0, WIDTH)
    m_row, m_column = o_row < batch, o_column < d
    stride_gate = heads * d
    # [BATCH, WIDTH]
    b_i, b_f, b_z, b_o = recurrent_sums(
        h, weight, m_row, o_row, i_tile, i_head, stride_gate, heads * d * d, d,
        preacts.dtype.element_ty, PRECISION, BATCH, WIDTH, INNER, STAGES,
    )  # fmt: skip
    m_tile = m_row[:, None] & m_column[None, :]
    o_head = i_head * d + o_column
    p_x = preacts + (o_row[:, None] * (4 * stride_gate) + o_head[None, :])
    b_i += load_wide(p_x, m_tile) + load_wide(bias + o_head, m_column)[None, :]
    o_head += stride_gate
    b_f += load_wide(p_x + stride_gate, m_tile) + load_wide(bias + o_head, m_column)[None, :]
    o_head += stride_gate
    b_z += load_wide(p_x + 2 * stride_gate, m_tile) + load_wide(bias + o_head, m_column)[None, :]
    o_head += stride_gate
    b_o += load_wide(p_x + 3 * stride_gate, m_tile) + load_wide(bias + o_head, m_column)[None, :]
    o_state = o_row[:, None] * stride_gate + (i_head * d + o_column)[None, :]
    b_c, b_n = load_wide(c + o_state, m_tile), load_wide(n + o_state, m_tile)
    b_m = tl.where(b_n == 0.0, -float("inf"), load_wide(m + o_state, m_tile))  # a fresh state
    b_h, b_c, b_n, b_m, _, _, _, _, _ = cell(b_i, b_f, b_z, b_o, b_c, b_n, b_m, SIGMOID)
    tl.debug_barrier()  # h_next may be h, which all threads read
    tl.store(h_next + o_state, b_h.to(h_next.dtype.element_ty), mask=m_tile)
    tl.store(c + o_state, b_c.to(c.dtype.element_ty), mask=m_tile)
    tl.store(n + o_state, b_n.to(n.dtype.element_ty), mask=m_tile)
    tl.store(m + o_state, b_m.to(m.dtype.element_ty), mask=m_tile)
    tl.store(out + o_state, b_h.to(out.dtype.element_ty), mask=m_tile)


def step_tiles(target: str, d: int, dtype: torch.dtype) -> Tiles:
    """Those of the largest heads, where one step is a launch as well, cut to the head."""
    tiles, whole = tiles_for(target, MOST, dtype), max(16, triton.next_power_of_2(d))
    return tiles._replace(width=min(tiles.width, whole), inner=min(tiles.inner, whole))


def plan_step(
    preacts: Tensor, weight: Tensor, bias: Tensor, state: tuple, sigmoid: bool, target: str
) -> tuple[Tensor, Tensor, Launch]:
    """What the launch fills with h, what with the new h of the state (perhaps itself), and it."""
    batch, _, heads, d = preacts.shape
    h, c, n, m = state
    tiles = step_tiles(target, d, preacts.dtype)
    count = triton.cdiv(d, tiles.width)
    out, h_next = torch.empty_like(preacts[:, 0]), h if count == 1 else torch.empty_like(h)
    arguments = {"preacts": preacts, "weight": weight, "bias": bias, "out": out}
    arguments |= {"h": h, "h_next": h_next, "c": c, "n": n, "m": m}
    arguments |= {"batch": batch, "heads": heads, "d": d, "tiles": count, "SIGMOID": sigmoid}
    arguments |= {"PRECISION": "tf32x3" if target.startswith("sm_") else "ieee", "BATCH": BATCH}
    arguments |= {"WIDTH": tiles.width, "INNER": tiles.inner, "STAGES": tiles.num_stages}
    grid = (triton.cdiv(batch, BATCH) * heads * count,)
    launch = Launch("slstm decode", one_step, grid, arguments, tiles.num_warps, tiles.num_stages)
    return out, h_next, launch


@torch.library.custom_op("xlstm_kernels::slstm_step_triton", mutates_args=("h", "c", "n", "m"))
def slstm_step_triton(
    gate_preacts: Tensor,
    recurrent_weight: Tensor,
    bias: Tensor,
    h: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    sigmoid_forget: bool,
) -> Tensor:
    """Triton backend of `xlstm_kernels.slstm_step` (checked arguments, same meaning).

    A state that is not contiguous is updated through a copy.
    """
    inputs = [x.contiguous() for x in (gate_preacts, recurrent_weight, bias)]
    state = (h, c, n, m)
    held = [x.contiguous() for x in state]
    target = architecture(gate_preacts.device)
    out, held[0], launch = plan_step(*inputs, held, sigmoid_forget, target)
    run_all([launch], gate_preacts)
    for kept, new in zip(state, held, strict=True):
        if kept is not new:
            kept.copy_(new)
    return out


@slstm_step_triton.register_fake
def _(gate_preacts, recurrent_weight, bias, h, c, n, m, sigmoid_forget):
    return gate_preacts.new_empty(h.shape)
