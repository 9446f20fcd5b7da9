"""The mLSTM for one token on Triton: reads and writes C once, in place.

Two launches: n and m are updated only after every tile of C has read the old ones. Both can be
captured in a graph: nothing depends on values, and nothing is allocated but h.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_kernels.common.triton_extremes import larger, smaller
from xlstm_kernels.common.triton_launch import Launch, run_all
from xlstm_kernels.mlstm.arguments import Inputs, State
from xlstm_kernels.mlstm.triton.chunkwise import unsupported_reason
from xlstm_kernels.mlstm.triton.gates import CLOSED, capped, log_sigmoid
from xlstm_kernels.mlstm.triton.tiles import block

__all__ = ["mlstm_step_triton", "unsupported_reason"]


@triton.jit
def step_gates(igate, fgate, m, i_row, cap, EXP_GATE: tl.constexpr, CAPPED: tl.constexpr):
    """The stabilized gates f and i of one row, and m after the token.

    They are computed from float64 logarithms, as in the chunks.
    """
    f = tl.load(fgate + i_row).to(tl.float64)
    i = tl.load(igate + i_row).to(tl.float64)
    if CAPPED:
        f, i = capped(f, cap), capped(i, cap)
    log_f = log_sigmoid(tl.where(f < CLOSED, CLOSED, f))
    if EXP_GATE:
        old = tl.load(m + i_row).to(tl.float64)
        new = larger(log_f + old, i).to(tl.float32).to(tl.float64)
        f_gate = tl.exp(smaller(log_f + old - new, 1.0))
        i_gate = tl.exp(smaller(i - new, 1.0))
    else:
        new = log_f * 0.0
        f_gate = tl.exp(log_f)
        i_gate = 1.0 / (1.0 + tl.exp(smaller(-i, 700.0)))
    return f_gate.to(tl.float32), i_gate.to(tl.float32), new.to(tl.float32)


@triton.jit
def step_kernel(
    q, k, v, igate, fgate, C, n, m, h, v_tiles, scale, eps, cap,
    QK: tl.constexpr, V: tl.constexpr, BQ: tl.constexpr, BV: tl.constexpr,
    EXP_GATE: tl.constexpr, NORMALIZE: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """A tile [QK, BV] of C of one row, updated in place, and its part of h; grid rows * v_tiles."""
    i_program = tl.program_id(0)
    i_row = (i_program // v_tiles).to(tl.int64)
    i_v = i_program % v_tiles
    f_gate, i_gate, m_new = step_gates(igate, fgate, m, i_row, cap, EXP_GATE, CAPPED)
    # [BV]
    o_v = i_v * BV + tl.arange(0, BV)
    b_v = tl.load(v + i_row * V + o_v, mask=o_v < V, other=0.0).to(tl.float32)
    b_sums = tl.zeros([BQ, BV], tl.float32)
    b_nq = tl.zeros([BQ], tl.float32)
    for i in range(0, QK, BQ):
        # [BQ]
        o_q = i + tl.arange(0, BQ)
        m_q = o_q < QK
        b_q = tl.load(q + i_row * QK + o_q, mask=m_q, other=0.0).to(tl.float32) * scale
        b_k = tl.load(k + i_row * QK + o_q, mask=m_q, other=0.0).to(tl.float32) * i_gate
        b_n = tl.load(n + i_row * QK + o_q, mask=m_q, other=0.0).to(tl.float32)
        b_nq += b_q * (b_n * f_gate + b_k)
        # [BQ, BV]
        p_C = C + i_row * (QK * V) + o_q[:, None] * V + o_v[None, :]
        m_C = m_q[:, None] & (o_v < V)[None, :]
        b_C = tl.load(p_C, mask=m_C, other=0.0).to(tl.float32)
        b_C = b_C * f_gate + b_k[:, None] * b_v[None, :]
        tl.store(p_C, b_C.to(C.dtype.element_ty), mask=m_C)
        b_sums += b_C * b_q[:, None]
    # [BV]
    b_h = tl.sum(b_sums, 0)
    if NORMALIZE:
        # e^-80 instead of 0: no 0 / 0 where eps = 0 and q is orthogonal to n.
        least = tl.exp(larger(-m_new, -80.0))
        b_h = b_h / (larger(tl.abs(tl.sum(b_nq, 0)), least) + eps)
    tl.store(h + i_row * V + o_v, b_h.to(h.dtype.element_ty), mask=o_v < V)


@triton.jit
def step_normalizer_kernel(
    k, igate, fgate, n, m, cap, QK: tl.constexpr, BQ: tl.constexpr, EXP_GATE: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """n and m of one row, updated in place; grid rows."""
    i_row = tl.program_id(0).to(tl.int64)
    f_gate, i_gate, m_new = step_gates(igate, fgate, m, i_row, cap, EXP_GATE, CAPPED)
    for i in range(0, QK, BQ):
        # [BQ]
        o_q = i + tl.arange(0, BQ)
        m_q = o_q < QK
        b_k = tl.load(k + i_row * QK + o_q, mask=m_q, other=0.0).to(tl.float32)
        b_n = tl.load(n + i_row * QK + o_q, mask=m_q, other=0.0).to(tl.float32)
        b_n = b_n * f_gate + b_k * i_gate
        tl.store(n + i_row * QK + o_q, b_n.to(n.dtype.element_ty), mask=m_q)
    tl.store(m + i_row, m_new.to(m.dtype.element_ty))


def plan_step(
    inputs: Inputs,
    state: State,
    gate: str,
    normalize: bool,
    eps: float,
    soft_cap: float | None,
) -> tuple[Tensor, list[Launch]]:
    """`h` (not yet computed) and the launches of one step on contiguous tensors."""
    q, k, v, igate, fgate = inputs
    C, n, m = state
    b, heads, qk_dim = q.shape
    v_dim = v.shape[-1]
    h = torch.empty(b, heads, v_dim, dtype=q.dtype, device=q.device)
    width = block(v_dim, 64)
    v_tiles = -(-v_dim // width)
    shared = {"igate": igate, "fgate": fgate, "n": n, "m": m, "k": k}
    shared |= {"QK": qk_dim, "BQ": block(qk_dim, 32), "EXP_GATE": gate == "exp"}
    shared |= {"cap": soft_cap or 0.0, "CAPPED": soft_cap is not None}
    arguments = shared | {"q": q, "v": v, "C": C, "h": h, "v_tiles": v_tiles, "eps": eps}
    arguments |= {"scale": qk_dim**-0.5, "V": v_dim, "BV": width, "NORMALIZE": normalize}
    rows = b * heads
    return h, [
        Launch("step", step_kernel, (rows * v_tiles,), arguments, 4, 2),
        Launch("step of the normalizer", step_normalizer_kernel, (rows,), shared, 1, 1),
    ]


@torch.library.custom_op("xlstm_kernels::mlstm_step_triton", mutates_args=("C", "n", "m"))
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    C: Tensor,
    n: Tensor,
    m: Tensor,
    gate: str,
    normalize: bool,
    eps: float,
    soft_cap: float | None,
) -> Tensor:
    """`h` of one token. C, n, m are updated in place, through copies if they are not contiguous."""
    inputs = Inputs(*(x.contiguous() for x in (q, k, v, igate_preact, fgate_preact)))
    state = (C, n, m)
    held = tuple(x.contiguous() for x in state)
    h, launches = plan_step(inputs, held, gate, normalize, eps, soft_cap)
    run_all(launches, q)
    for kept, new in zip(state, held, strict=True):
        if kept is not new:
            kept.copy_(new)
    return h


@_step.register_fake
def _(q, k, v, i, f, C, n, m, gate, normalize, eps, soft_cap):
    return q.new_empty(v.shape)


def mlstm_step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    state: State,
    *,
    gate: str,
    normalize: bool,
    eps: float,
    gate_soft_cap: float | None,
) -> Tensor:
    """Triton backend of `xlstm_kernels.mlstm_step` (checked arguments, same meaning)."""
    gates = igate_preact, fgate_preact
    return _step(q, k, v, *gates, *state, gate, normalize, eps, gate_soft_cap)
