"""The two passes of the chunkwise mLSTM over some rows of b * heads, with torch operations.

Everything is written into memory that the caller gives. r is the number of rows, L the number of
tokens in a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_kernels.common.checks import compute_dtype
from xlstm_kernels.common.cumulative_sum import cumulative_sum
from xlstm_kernels.mlstm.arguments import Gradients, Inputs, State
from xlstm_kernels.mlstm.torch.carry import carry, carry_back, transfers_of
from xlstm_kernels.mlstm.torch.decays import decays_of


class Options(NamedTuple):
    """What a pass depends on beside its tensors; see `xlstm_kernels.mlstm_chunkwise`."""

    exp_gate: bool
    normalize: bool
    eps: float


class Saved(NamedTuple):
    """What the backward pass needs beside the inputs and h, for all rows.

    D and the names after it are those of `Decays`.
    """

    h_wide: Tensor  # [r, s, v_dim] h before rounding to the dtype of q; empty if not rounded
    weights: Tensor  # [r, chunks, L, L] q k^T times D
    C_before: Tensor  # [r, chunks, qk_dim * v_dim] state before each chunk, as it is kept
    n_before: Tensor  # [r, chunks, qk_dim]
    nq: Tensor  # [r, chunks, L] n.q
    D: Tensor
    b_bar: Tensor
    a_bar: Tensor
    least_normalizer: Tensor
    log_g: Tensor
    starts: Tensor


def cut(length: int, chunk_size: int) -> tuple[int, int]:
    """Number of chunks and tokens in each: as even as can be, the last one padded."""
    chunks = -(-length // chunk_size)
    return chunks, -(-length // chunks)


def allocate_forward(
    q: Tensor, v: Tensor, chunk_size: int, need_last: bool, bf16_states: bool = False
):
    """Fresh tensors for h, the last state (C, n, m) and `Saved`.

    C and n of the last state are empty unless they are asked for. With `bf16_states` C is kept in
    bf16 between chunks.
    """
    b, heads, s, qk_dim = q.shape
    v_dim = v.shape[-1]
    rows = b * heads
    chunks, length = cut(s, chunk_size)
    dtype = compute_dtype(q.dtype)

    def new(*shape, dtype=dtype):
        return q.new_empty(shape, dtype=dtype)

    h = new(b, heads, s, v_dim, dtype=q.dtype)
    C_last = new(b, heads, qk_dim, v_dim) if need_last else new(0)
    n_last = new(b, heads, qk_dim) if need_last else new(0)
    saved = Saved(
        h_wide=new(0) if q.dtype == dtype else new(rows, s, v_dim),
        weights=new(rows, chunks, length, length),
        C_before=new(rows, chunks, qk_dim * v_dim, dtype=torch.bfloat16 if bf16_states else dtype),
        n_before=new(rows, chunks, qk_dim),
        nq=new(rows, chunks, length),
        D=new(rows, chunks, length, length),
        b_bar=new(rows, chunks, length),
        a_bar=new(rows, chunks, length),
        least_normalizer=new(rows, chunks, length),
        log_g=new(rows, chunks, dtype=torch.float64),
        starts=new(rows, chunks, dtype=torch.float64),
    )
    return h, (C_last, n_last, new(b, heads)), saved


def allocate_gradients(inputs: Inputs, need_state: bool) -> Gradients:
    """Fresh tensors for all gradients; those of a state in the dtype of the computation."""
    q, v = inputs.q, inputs.v
    b, heads, _, qk_dim = q.shape
    dtype = compute_dtype(q.dtype)
    dC = dn = None
    if need_state:
        dC = q.new_empty(b, heads, qk_dim, v.shape[-1], dtype=dtype)
        dn = q.new_empty(b, heads, qk_dim, dtype=dtype)
    return Gradients(*(x.new_empty(x.shape) for x in inputs), dC, dn)


def _by_chunk(x: Tensor, chunks: int, length: int, dtype: torch.dtype) -> Tensor:
    """`x` [r, s, d] as [r * chunks, L, d] in `dtype`, zero beyond the sequence."""
    r, s, d = x.shape
    if x.dtype != dtype or not x.is_contiguous() or s != chunks * length:
        padded = x.new_empty(r, chunks * length, d, dtype=dtype)
        padded[:, :s].copy_(x)
        padded[:, s:].zero_()
        x = padded
    return x.view(r * chunks, length, d)


def _room_for(x: Tensor, chunks: int, length: int, dtype: torch.dtype) -> Tensor:
    """Memory for a result [r * chunks, L, d] that `_put` brings to x [r, s, d]: x itself, if so."""
    r, s, d = x.shape
    if x.dtype != dtype or s != chunks * length:
        return x.new_empty(r * chunks, length, d, dtype=dtype)
    return x.view(r * chunks, length, d)


def _put(x: Tensor, result: Tensor) -> None:
    """Bring `result` [r * chunks, L, d] to x [r, s, d]: without padding, in the dtype of x."""
    if x.data_ptr() != result.data_ptr():
        x.copy_(result.view(x.shape[0], -1, x.shape[2])[:, : x.shape[1]])


def forward_pass(
    inputs: Inputs,
    state: State | None,
    boundaries: Tensor | None,
    options: Options,
    h_out: Tensor,
    last: State,
    saved: Saved,
) -> None:
    """The forward pass: fills `h_out`, the last state and `saved`.

    Args:
        inputs: [r, s, ...] each.
        state: The initial state [r, ...], or None for zeros.
        boundaries: bool [r, s] or None.
        options: Of the call.
        h_out: [r, s, v_dim] in the dtype of q.
        last: The state after the last token; C and n are empty where they are not asked for.
        saved: For the backward pass.
    """
    C, n, m = (None, None, None) if state is None else state
    C_last, n_last, m_last = last
    r, qk_dim, v_dim = inputs.q.shape[0], inputs.q.shape[-1], inputs.v.shape[-1]
    chunks, length = saved.weights.shape[1:3]
    dtype = saved.weights.dtype
    decays = decays_of(
        inputs.igate[:, None],
        inputs.fgate[:, None],
        None if m is None else m[:, None],
        boundaries,
        D=saved.D,
        scale=qk_dim**-0.5,
        exp_gate=options.exp_gate,
    )
    transfers = transfers_of(decays.log_g, decays.starts, dtype)
    q, k, v = (_by_chunk(x, chunks, length, dtype) for x in inputs[:3])

    weights, nq = saved.weights.flatten(0, 1), saved.nq.flatten(0, 1)
    torch.bmm(q, k.mT, out=weights).mul_(decays.D)
    h_place = h_out if saved.h_wide.numel() == 0 else saved.h_wide
    h = _room_for(h_place, chunks, length, dtype)
    torch.bmm(weights, v, out=h)
    torch.sum(weights, -1, out=nq)

    scratch = k * decays.a_bar[..., None]
    C_written = torch.bmm(scratch.mT, v).view(r, chunks, -1)
    n_written = scratch.sum(1).view(r, chunks, -1)
    C, n = (None if x is None else x.to(dtype).reshape(r, -1) for x in (C, n))
    need_last = C_last.numel() > 0
    rounded = saved.C_before.dtype != dtype
    C_before = torch.empty_like(saved.C_before, dtype=dtype) if rounded else saved.C_before
    C_after = carry(transfers, C_written, C, need_last, C_before)
    if rounded:  # what reads the state sees it as it is kept
        C_before.copy_(saved.C_before.copy_(C_before))
    n_after = carry(transfers, n_written, n, need_last, saved.n_before)
    torch.mul(q, decays.b_bar[..., None], out=scratch)
    h.baddbmm_(scratch, C_before.view(-1, qk_dim, v_dim))
    nq += scratch.mul_(saved.n_before.view(-1, 1, qk_dim)).sum(-1)
    if options.normalize:
        h.div_((torch.maximum(nq.abs(), decays.least_normalizer) + options.eps)[..., None])

    _put(h_place, h)
    if h_place is not h_out:
        h_out.copy_(h_place)
    if need_last:
        C_last.copy_(C_after.view(r, qk_dim, v_dim))
        n_last.copy_(n_after)
    m_last.copy_(decays.last_m[:, 0])
    for name in ("b_bar", "a_bar", "least_normalizer", "log_g", "starts"):
        place = getattr(saved, name)
        place.copy_(getattr(decays, name).view(place.shape))


def backward_pass(
    inputs: Inputs,
    h: Tensor,
    d_h: Tensor,
    d_last: tuple[Tensor | None, Tensor | None],
    options: Options,
    saved: Saved,
    grads: Gradients,
) -> None:
    """The backward pass: fills `grads`.

    Args:
        inputs: [r, s, ...] each.
        h: Result of the forward pass, [r, s, v_dim].
        d_h: Gradient of h.
        d_last: Gradients of C and n of the last state, None for zeros.
        options: Of the call.
        saved: What the forward pass left.
        grads: [r, ...] each; dC and dn are None where there is no initial state.
    """
    (r, chunks, length, _), dtype = saved.weights.shape, saved.weights.dtype
    qk_dim, v_dim = inputs.q.shape[-1], inputs.v.shape[-1]
    need_state = grads.dC is not None
    transfers = transfers_of(saved.log_g, saved.starts, dtype)
    h = h if saved.h_wide.numel() == 0 else saved.h_wide
    q, k, v, d_h, h = (_by_chunk(x, chunks, length, dtype) for x in (*inputs[:3], d_h, h))
    weights, D = saved.weights.flatten(0, 1), saved.D.flatten(0, 1)
    nq, least_normalizer = saved.nq.flatten(0, 1), saved.least_normalizer.flatten(0, 1)
    b_bar, a_bar = saved.b_bar.flatten(0, 1), saved.a_bar.flatten(0, 1)[..., None]
    C_before, n_before = saved.C_before.to(dtype), saved.n_before.view(-1, qk_dim)
    C_before = C_before.view(-1, qk_dim, v_dim)
    scratch_k, scratch_v = torch.empty_like(q), torch.empty_like(v)
    dq, dk, dv = (_room_for(x, chunks, length, dtype) for x in grads[:3])

    d_nq = torch.zeros_like(nq)
    if options.normalize:
        normalizer = torch.maximum(nq.abs(), least_normalizer) + options.eps
        d_normalizer = torch.mul(d_h, h, out=scratch_v).sum(-1).div_(normalizer).neg_()
        d_nq = torch.where(nq.abs() > least_normalizer, d_normalizer * nq.sign(), 0.0)
        d_h = d_h / normalizer[..., None]  # from here on: gradient of the numerator

    # Inside the chunk. G = d_weights * weights is the gradient of the log weights: summed over
    # targets at or after t (a triangular product) it gives igate (all sources, t = first row) and
    # fgate (sources before t).
    d_weights = torch.bmm(d_h, v.mT).add_(d_nq[..., None])
    G = d_weights * weights
    d_scores = d_weights.mul_(D)  # of q k^T
    ones = G.new_ones(length, length)
    later = torch.bmm(ones.triu().expand_as(G), G)
    d_log_i = later[:, 0].clone()
    d_log_f = later.mul_(ones.tril(-1)).sum(-1)
    torch.bmm(weights.mT, d_h, out=dv)

    # Through the state before the chunk.
    torch.mul(d_h, b_bar[..., None], out=scratch_v)
    d_nq *= b_bar
    torch.bmm(scratch_v, C_before.mT, out=dq).addcmul_(d_nq[..., None], n_before[:, None])
    row = torch.mul(q, dq, out=scratch_k).sum(-1)
    d_log_f += cumulative_sum(row.flip(-1)).flip(-1)
    dC_before = torch.bmm(q.mT, scratch_v)
    dn_before = torch.mul(q, d_nq[..., None], out=scratch_k).sum(1)
    dC_last, dn_last = (None if x is None else x.to(dtype).reshape(r, -1) for x in d_last)
    dC_written, dC = carry_back(transfers, dC_before.view(r, chunks, -1), dC_last, need_state)
    dC_written = dC_written.to(saved.C_before.dtype).to(dtype)  # kept as the states are
    dn_written, dn = carry_back(transfers, dn_before.view(r, chunks, -1), dn_last, need_state)
    dC_written, dn_written = dC_written.view(-1, qk_dim, v_dim), dn_written.view(-1, qk_dim)

    # Through the state after the chunk, and across the whole chunk.
    torch.mul(v, a_bar, out=scratch_v)
    torch.bmm(scratch_v, dC_written.mT, out=dk).addcmul_(a_bar, dn_written[:, None])
    column = torch.mul(k, dk, out=scratch_k).sum(-1)
    d_log_i += column
    d_log_f[:, 1:] += cumulative_sum(column[:, :-1])
    dv.baddbmm_(torch.mul(k, a_bar, out=scratch_k), dC_written)
    across = torch.mul(C_before, dC_written, out=dC_before).sum((-2, -1))
    across += (n_before * dn_written).sum(-1)
    g_bar = saved.log_g.exp().masked_fill_(saved.starts > 0, 0).to(dtype).view(-1)
    d_log_f += (g_bar * across)[:, None]

    dq.baddbmm_(d_scores, k)
    dk.baddbmm_(d_scores.mT, q)
    for place, result in zip(grads[:3], (dq, dk, dv), strict=True):
        _put(place, result)
    igate, fgate = inputs.igate, inputs.fgate
    d_log_f, d_log_i = (x.view(r, -1)[:, : fgate.shape[1]] for x in (d_log_f, d_log_i))
    grads.d_fgate.copy_(d_log_f.mul_(torch.sigmoid(-fgate.to(dtype))))
    grads.d_igate.copy_(
        d_log_i if options.exp_gate else d_log_i.mul_(torch.sigmoid(-igate.to(dtype)))
    )
    if need_state:
        grads.dC.copy_(dC.view(r, qk_dim, v_dim))
        grads.dn.copy_(dn)
