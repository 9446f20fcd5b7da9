"""MLSTM for one token on Triton: reads and writes C once, in place.

Two launches: n and m are updated only after every tile of C has read the old ones. Both can be
captured in a graph: nothing depends on values, and nothing is allocated but h.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_kernels.common.triton_launch import Launch, run_all
from xlstm_kernels.mlstm.triton.chunkwise import refusal
from xlstm_kernels.mlstm.triton.gates import capped
from xlstm_kernels.mlstm.triton.tiles import block

__all__ = ["mlstm_step_triton", "refusal"]

State = tuple[Tensor, Tensor, Tensor]


@triton.jit
def step_gates(igate, fgate, m, row, cap, EXP_GATE: tl.constexpr, CAPPED: tl.constexpr):
    """(decay, write, m after the token) of one row, from float64 logarithms as in the chunks."""
    f = tl.load(fgate + row).to(tl.float64)
    i = tl.load(igate + row).to(tl.float64)
    if CAPPED:
        f, i = capped(f, cap), capped(i, cap)
    log_f = tl.minimum(f, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(f)))
    if EXP_GATE:
        old = tl.load(m + row).to(tl.float64)
        new = tl.maximum(log_f + old, i).to(tl.float32).to(tl.float64)
        decay = tl.exp(tl.minimum(log_f + old - new, 1.0))
        write = tl.exp(tl.minimum(i - new, 1.0))
    else:
        new = f * 0.0
        decay = tl.exp(log_f)
        write = 1.0 / (1.0 + tl.exp(tl.minimum(-i, 700.0)))
    return decay.to(tl.float32), write.to(tl.float32), new.to(tl.float32)


@triton.jit
def step_kernel(
    q, k, v, igate, fgate, C, n, m, h, v_tiles, scale, eps, cap,
    QK: tl.constexpr, V: tl.constexpr, BQ: tl.constexpr, BV: tl.constexpr,
    EXP_GATE: tl.constexpr, NORMALIZE: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """A tile [QK, BV] of C of one row, updated in place, and its part of h; grid rows * v_tiles."""
    pid = tl.program_id(0)
    row = (pid // v_tiles).to(tl.int64)
    tile = pid % v_tiles
    decay, write, m_new = step_gates(igate, fgate, m, row, cap, EXP_GATE, CAPPED)
    dv = tile * BV + tl.arange(0, BV)
    vt = tl.load(v + row * V + dv, mask=dv < V, other=0.0).to(tl.float32)
    sums = tl.zeros([BQ, BV], tl.float32)
    nq = tl.zeros([BQ], tl.float32)
    for i in range(0, QK, BQ):
        dq = i + tl.arange(0, BQ)
        qt = tl.load(q + row * QK + dq, mask=dq < QK, other=0.0).to(tl.float32) * scale
        kt = tl.load(k + row * QK + dq, mask=dq < QK, other=0.0).to(tl.float32) * write
        nt = tl.load(n + row * QK + dq, mask=dq < QK, other=0.0).to(tl.float32)
        nq += qt * (nt * decay + kt)
        pointers = C + row * (QK * V) + dq[:, None] * V + dv[None, :]
        inside = (dq < QK)[:, None] & (dv < V)[None, :]
        ct = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        ct = ct * decay + kt[:, None] * vt[None, :]
        tl.store(pointers, ct.to(C.dtype.element_ty), mask=inside)
        sums += ct * qt[:, None]
    out = tl.sum(sums, 0)
    if NORMALIZE:
        # e^-80 instead of 0: no 0 / 0 where eps = 0 and q is orthogonal to n.
        floor = tl.exp(tl.maximum(-m_new, -80.0))
        out = out / (tl.maximum(tl.abs(tl.sum(nq, 0)), floor) + eps)
    tl.store(h + row * V + dv, out.to(h.dtype.element_ty), mask=dv < V)


@triton.jit
def step_normalizer_kernel(
    k, igate, fgate, n, m, cap, QK: tl.constexpr, BQ: tl.constexpr, EXP_GATE: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """n and m of one row, updated in place; grid rows."""
    row = tl.program_id(0).to(tl.int64)
    decay, write, m_new = step_gates(igate, fgate, m, row, cap, EXP_GATE, CAPPED)
    for i in range(0, QK, BQ):
        dq = i + tl.arange(0, BQ)
        kt = tl.load(k + row * QK + dq, mask=dq < QK, other=0.0).to(tl.float32)
        nt = tl.load(n + row * QK + dq, mask=dq < QK, other=0.0).to(tl.float32)
        nt = nt * decay + kt * write
        tl.store(n + row * QK + dq, nt.to(n.dtype.element_ty), mask=dq < QK)
    tl.store(m + row, m_new.to(m.dtype.element_ty))


def plan_step(
    q, k, v, i, f, state: State, gate: str, normalize: bool, eps: float, soft_cap: float | None
) -> tuple[Tensor, list[Launch]]:
    """H (not yet computed) and the launches of one step on contiguous tensors."""
    C, n, m = state
    b, heads, qk = q.shape
    dim = v.shape[-1]
    h = torch.empty(b, heads, dim, dtype=q.dtype, device=q.device)
    width = block(dim, 64)
    v_tiles = -(-dim // width)
    sizes = {"QK": qk, "BQ": block(qk, 32), "EXP_GATE": gate == "exp"}
    sizes |= {"cap": soft_cap or 0.0, "CAPPED": soft_cap is not None}
    gates = {"igate": i, "fgate": f, "n": n, "m": m, "k": k}
    arguments = {
        "q": q, "v": v, "C": C, "h": h, "v_tiles": v_tiles, "scale": qk**-0.5, "eps": eps,
        "V": dim, "BV": width, "NORMALIZE": normalize,
    } | gates | sizes  # fmt: skip
    return h, [
        Launch("step", step_kernel, (b * heads * v_tiles,), arguments, 4, 2),
        Launch("step of the normalizer", step_normalizer_kernel, (b * heads,), gates | sizes, 1, 1),
    ]


@torch.library.custom_op("xlstm_kernels::mlstm_step_triton", mutates_args=("C", "n", "m"))
def _step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor,
    gate: str, normalize: bool, eps: float, soft_cap: float | None,
) -> Tensor:  # fmt: skip
    """H of one token; C, n, m are updated in place, through copies if they are not contiguous."""
    inputs = [x.contiguous() for x in (q, k, v, i, f)]
    state = (C, n, m)
    held = tuple(x.contiguous() for x in state)
    h, launches = plan_step(*inputs, held, gate, normalize, eps, soft_cap)
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
