"""SLSTM for one token on Triton: a program has some columns of one head, and the state in place.

Every program of a head reads all of h, so the new h goes to memory of its own and replaces the old
one afterwards; a head of a single tile needs neither. Nothing depends on values: a GPU graph can
capture it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_kernels.common.triton_launch import Launch, architecture, run_all
from xlstm_kernels.slstm.triton.kernels import cell, load_wide, recurrent_sums
from xlstm_kernels.slstm.triton.scan import BATCH, MOST, Tiles, refusal, tiles_for

__all__ = ["refusal", "slstm_step_triton"]


@triton.jit(do_not_specialize=["batch"])
def one_step(
    preacts, weight, bias, h, h_next, c, n, m, out, batch, heads, d, tiles,
    SIGMOID: tl.constexpr, PRECISION: tl.constexpr, BATCH: tl.constexpr, WIDTH: tl.constexpr,
    INNER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """WIDTH columns of a head and BATCH rows; grid: blocks of rows * heads * tiles."""
    pid = tl.program_id(0).to(tl.int64)
    tile, head = pid % tiles, pid // tiles % heads
    row = pid // tiles // heads * BATCH + tl.arange(0, BATCH)
    column = tile * WIDTH + tl.arange(0, WIDTH)
    alive, inside = row < batch, column < d
    width = heads * d
    i, f, z, o = recurrent_sums(
        h, weight, alive, row, column, inside, head, width, heads * d * d, d,
        preacts.dtype.element_ty, PRECISION, BATCH, WIDTH, INNER, STAGES,
    )  # fmt: skip
    mask = alive[:, None] & inside[None, :]
    position = head * d + column
    at4 = row[:, None] * (4 * width) + position[None, :]
    i += load_wide(preacts + at4, mask) + load_wide(bias + position, inside)[None, :]
    position += width
    f += load_wide(preacts + at4 + width, mask) + load_wide(bias + position, inside)[None, :]
    position += width
    z += load_wide(preacts + at4 + 2 * width, mask) + load_wide(bias + position, inside)[None, :]
    position += width
    o += load_wide(preacts + at4 + 3 * width, mask) + load_wide(bias + position, inside)[None, :]
    at = row[:, None] * width + (head * d + column)[None, :]
    c_old, n_old = load_wide(c + at, mask), load_wide(n + at, mask)
    m_old = tl.where(n_old == 0.0, -float("inf"), load_wide(m + at, mask))  # a fresh state
    h_new, c_new, n_new, m_new, _, _, _, _, _ = cell(i, f, z, o, c_old, n_old, m_old, SIGMOID)
    tl.debug_barrier()  # h_next may be h, which all threads read
    tl.store(h_next + at, h_new.to(h_next.dtype.element_ty), mask=mask)
    tl.store(c + at, c_new.to(c.dtype.element_ty), mask=mask)
    tl.store(n + at, n_new.to(n.dtype.element_ty), mask=mask)
    tl.store(m + at, m_new.to(m.dtype.element_ty), mask=mask)
    tl.store(out + at, h_new.to(out.dtype.element_ty), mask=mask)


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
    arguments = {
        "preacts": preacts, "weight": weight, "bias": bias, "h": h, "h_next": h_next, "c": c,
        "n": n, "m": m, "out": out, "batch": batch, "heads": heads, "d": d, "tiles": count,
        "SIGMOID": sigmoid, "PRECISION": "tf32x3" if target.startswith("sm_") else "ieee",
        "BATCH": BATCH, "WIDTH": tiles.width, "INNER": tiles.inner, "STAGES": tiles.num_stages,
    }  # fmt: skip
    launch = Launch(
        "slstm decode", one_step, (triton.cdiv(batch, BATCH) * heads * count,), arguments,
        tiles.num_warps, tiles.num_stages,
    )  # fmt: skip
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
