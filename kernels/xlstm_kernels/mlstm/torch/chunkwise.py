"""MLSTM in chunkwise-parallel form with torch operations, forward and backward by hand.

Inside a chunk of L tokens the cell is a decay-weighted L x L attention; chunks exchange states
(C, n), and all states follow from one chunk-by-chunk matrix of decays, so that there is no loop
over chunks. Products are batched over b * heads * chunks.

What the gates decide is known before the first product (`decays`), so nothing is rescaled.
Gradients of the forget gate add up exactly the pairs (source before t, target at or after t),
without the cancellation of the usual reversed cumulative sum of q.dq - k.dk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_kernels.common.checks import compute_dtype
from xlstm_kernels.common.running_sum import running_sum
from xlstm_kernels.common.torch_op import torch_op
from xlstm_kernels.mlstm.torch.carry import carry, carry_back, transfers_of
from xlstm_kernels.mlstm.torch.decays import decays_of

BLOCK_NUMBERS = 1 << 19  # in the largest array of one block and thread: 2 MB

State = tuple[Tensor, Tensor, Tensor]


def mlstm_chunkwise_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    initial_state: State | None,
    *,
    chunk_size: int | None,
    return_last_state: bool,
    boundaries: Tensor | None,
    gate: str,
    normalize: bool,
    eps: float,
) -> Tensor | tuple[Tensor, State]:
    """Torch backend of `xlstm_kernels.mlstm_chunkwise` (checked arguments, same meaning)."""
    C, n, m = initial_state if initial_state is not None else (None, None, None)
    h, *state = mlstm_forward(
        q, k, v, igate_preact, fgate_preact, C, n, m, boundaries,
        chunk_size or _default_chunk_size(q.shape[-1], v.shape[-1]),
        gate == "exp", normalize, eps, return_last_state,
    )  # fmt: skip
    return (h, tuple(state[:3])) if return_last_state else h


def _default_chunk_size(qk_dim: int, v_dim: int) -> int:
    """Fastest of 32, 64, 128 measured on a CPU: small heads make states cheap, pairs dear."""
    return 32 if qk_dim * v_dim < 64 * 64 else 64


def _cut(length: int, chunk_size: int) -> tuple[int, int]:
    """Number of chunks and tokens in each: as even as can be, the last one padded."""
    chunks = -(-length // chunk_size)
    return chunks, -(-length // chunks)


def _blocks(q: Tensor, v: Tensor, chunks: int) -> list[slice]:
    """The b * heads rows in blocks that are worked off one after the other.

    On a CPU the first touch of fresh memory costs as much as a product with it. Arrays of one
    block are small enough to stay in the cache and to be used again by the next.
    """
    b, heads, s, qk_dim = q.shape
    rows, v_dim = b * heads, v.shape[-1]
    at_once = rows
    if q.device.type == "cpu":
        largest = max(s * max(qk_dim, v_dim), chunks * qk_dim * v_dim)
        at_once = min(rows, max(1, BLOCK_NUMBERS * torch.get_num_threads() // largest))
    return [slice(first, min(first + at_once, rows)) for first in range(0, rows, at_once)]


def _by_chunk(x: Tensor, chunks: int, length: int, dtype: torch.dtype) -> Tensor:
    """[r, s, d] as [r * chunks, L, d] in `dtype`, zero beyond the sequence."""
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


class _Forward(NamedTuple):
    """Results of the forward pass: h and the last state, then what the backward pass needs.

    Those of all b * heads rows; pairs, read, write, floor, log_keep and starts: see Decays.
    """

    h: Tensor  # [b, heads, s, v_dim] in the dtype of q
    C_last: Tensor  # the last state; C and n are empty if not asked for
    n_last: Tensor
    m_last: Tensor
    h_wide: Tensor  # [rows, s, v_dim] h before rounding to the dtype of q; empty if that is none
    weights: Tensor  # [rows, chunks, L, L] q.k under `pairs`
    C_before: Tensor  # [rows, chunks, qk_dim * v_dim] state before each chunk
    n_before: Tensor  # [rows, chunks, qk_dim]
    overlap: Tensor  # [rows, chunks, L] n.q
    pairs: Tensor
    read: Tensor
    write: Tensor
    floor: Tensor
    log_keep: Tensor
    starts: Tensor


def _allocate(q: Tensor, v: Tensor, chunk_size: int, need_last: bool) -> _Forward:
    b, heads, s, qk_dim = q.shape
    v_dim = v.shape[-1]
    rows = b * heads
    chunks, length = _cut(s, chunk_size)
    dtype = compute_dtype(q.dtype)

    def new(*shape, dtype=dtype):
        return q.new_empty(shape, dtype=dtype)

    return _Forward(
        h=new(b, heads, s, v_dim, dtype=q.dtype),
        C_last=new(b, heads, qk_dim, v_dim) if need_last else new(0),
        n_last=new(b, heads, qk_dim) if need_last else new(0),
        m_last=new(b, heads),
        h_wide=new(0) if q.dtype == dtype else new(rows, s, v_dim),
        weights=new(rows, chunks, length, length),
        C_before=new(rows, chunks, qk_dim * v_dim),
        n_before=new(rows, chunks, qk_dim),
        overlap=new(rows, chunks, length),
        pairs=new(rows, chunks, length, length),
        read=new(rows, chunks, length),
        write=new(rows, chunks, length),
        floor=new(rows, chunks, length),
        log_keep=new(rows, chunks, dtype=torch.float64),
        starts=new(rows, chunks, dtype=torch.float64),
    )


def _rows(x: Tensor | None) -> Tensor | None:
    """[b, heads, ...] as [b * heads, ...]."""
    return None if x is None else x.flatten(0, 1)


@torch_op("mlstm_torch")
def mlstm_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    C: Tensor | None,
    n: Tensor | None,
    m: Tensor | None,
    boundaries: Tensor | None,
    chunk_size: int,
    exp_gate: bool,
    normalize: bool,
    eps: float,
    need_last: bool,
) -> list[Tensor]:
    """The forward pass: the fields of `_Forward`."""
    heads = q.shape[1]
    chunks, _ = _cut(q.shape[2], chunk_size)
    out = _allocate(q, v, chunk_size, need_last)
    inputs = [_rows(x) for x in (q, k, v, igate_preact, fgate_preact, C, n, m)]
    inputs.append(None if boundaries is None else boundaries.repeat_interleave(heads, 0))
    results = [x.flatten(0, 1) if x.ndim > 1 else x for x in out[:4]] + list(out[4:])
    for block in _blocks(q, v, chunks):
        _forward_block(
            *(None if x is None else x[block] for x in inputs),
            _Forward(*(x if x.numel() == 0 else x[block] for x in results)),
            exp_gate, normalize, eps,
        )  # fmt: skip
    return list(out)


def _forward_block(q, k, v, i, f, C, n, m, boundaries, out, exp_gate, normalize, eps):
    """Some rows of the forward pass, [r, ...] each, into views of the results."""
    r, qk_dim = q.shape[0], q.shape[-1]
    v_dim, dtype = v.shape[-1], out.weights.dtype
    chunks, length = out.weights.shape[1:3]
    decays = decays_of(
        i[:, None], f[:, None], None if m is None else m[:, None], boundaries, chunks, length,
        qk_dim**-0.5, exp_gate, dtype, out.pairs,
    )  # fmt: skip
    transfers = transfers_of(decays.log_keep, decays.starts, dtype)
    query, key, value = (_by_chunk(x, chunks, length, dtype) for x in (q, k, v))

    weights, overlap = out.weights.flatten(0, 1), out.overlap.flatten(0, 1)
    torch.bmm(query, key.mT, out=weights).mul_(decays.pairs)
    h_place = out.h if out.h_wide.numel() == 0 else out.h_wide
    h = _room_for(h_place, chunks, length, dtype)
    torch.bmm(weights, value, out=h)
    torch.sum(weights, -1, out=overlap)

    scratch = key * decays.write[..., None]
    C_written = torch.bmm(scratch.mT, value).view(r, chunks, -1)
    n_written = scratch.sum(1).view(r, chunks, -1)
    C, n = (None if x is None else x.to(dtype).reshape(r, -1) for x in (C, n))
    need_last = out.C_last.numel() > 0
    C_last = carry(transfers, C_written, C, need_last, out.C_before)
    n_last = carry(transfers, n_written, n, need_last, out.n_before)
    torch.mul(query, decays.read[..., None], out=scratch)
    h.baddbmm_(scratch, out.C_before.view(-1, qk_dim, v_dim))
    overlap += scratch.mul_(out.n_before.view(-1, 1, qk_dim)).sum(-1)
    if normalize:
        h.div_((torch.maximum(overlap.abs(), decays.floor) + eps)[..., None])

    _put(h_place, h)
    if h_place is not out.h:
        out.h.copy_(h_place)
    if need_last:
        out.C_last.copy_(C_last.view(r, qk_dim, v_dim))
        out.n_last.copy_(n_last)
    out.m_last.copy_(decays.last_m[:, 0])
    for name in ("read", "write", "floor", "log_keep", "starts"):
        place = getattr(out, name)
        place.copy_(getattr(decays, name).view(place.shape))


@mlstm_forward.register_fake
def _(q, k, v, igate_preact, fgate_preact, C, n, m, boundaries, chunk_size, exp_gate, normalize,
      eps, need_last):  # fmt: skip
    return list(_allocate(q, v, chunk_size, need_last))


class _Gradients(NamedTuple):
    """Of the arguments, in their dtypes; of an initial state in the dtype of the computation."""

    q: Tensor
    k: Tensor
    v: Tensor
    i: Tensor
    f: Tensor
    C: Tensor | None
    n: Tensor | None


def _allocate_gradients(q, k, v, i, f, need_state) -> _Gradients:
    b, heads, _, qk_dim = q.shape
    dtype = compute_dtype(q.dtype)
    C = n = None
    if need_state:
        C = q.new_empty(b, heads, qk_dim, v.shape[-1], dtype=dtype)
        n = q.new_empty(b, heads, qk_dim, dtype=dtype)
    return _Gradients(*(x.new_empty(x.shape) for x in (q, k, v, i, f)), C, n)


@torch_op("mlstm_torch_backward")
def mlstm_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    d_h: Tensor,
    d_C_last: Tensor | None,
    d_n_last: Tensor | None,
    saved: list[Tensor],
    exp_gate: bool,
    normalize: bool,
    eps: float,
    need_state: bool,
) -> list[Tensor]:
    """Gradients of q, k, v and the gates in their dtypes; with `need_state` of C and n as well.

    `saved` is `_Forward` without the last state.
    """
    grads = _allocate_gradients(q, k, v, igate_preact, fgate_preact, need_state)
    h, *buffers = saved
    chunks = buffers[1].shape[1]
    inputs = [_rows(x) for x in (q, k, v, igate_preact, fgate_preact, d_h, d_C_last, d_n_last, h)]
    results = [_rows(x) for x in grads]
    for block in _blocks(q, v, chunks):
        _backward_block(
            *(None if x is None else x[block] for x in inputs),
            *(x if x.numel() == 0 else x[block] for x in buffers),
            _Gradients(*(None if x is None else x[block] for x in results)),
            exp_gate, normalize, eps,
        )  # fmt: skip
    return [x for x in grads if x is not None]


def _backward_block(
    q, k, v, i, f, d_h, d_C_last, d_n_last, h, h_wide, weights, C_before, n_before, overlap, pairs,
    read, write, floor, log_keep, starts, grads, exp_gate, normalize, eps,
):  # fmt: skip
    """Some rows of the backward pass, [r, ...] each, into views of the gradients."""
    (r, chunks, length, _), qk_dim, v_dim = weights.shape, q.shape[-1], v.shape[-1]
    dtype, need_state = weights.dtype, grads.C is not None
    transfers = transfers_of(log_keep, starts, dtype)
    h = h if h_wide.numel() == 0 else h_wide
    query, key, value, d_h, h = (_by_chunk(x, chunks, length, dtype) for x in (q, k, v, d_h, h))
    weights, overlap, pairs, read, write, floor = (
        x.flatten(0, 1) for x in (weights, overlap, pairs, read, write, floor)
    )
    C_before, n_before = C_before.view(-1, qk_dim, v_dim), n_before.view(-1, qk_dim)
    scratch_k, scratch_v = torch.empty_like(query), torch.empty_like(value)
    d_q, d_k, d_v = (_room_for(x, chunks, length, dtype) for x in grads[:3])

    d_overlap = torch.zeros_like(overlap)
    if normalize:
        scale = torch.maximum(overlap.abs(), floor) + eps
        d_scale = torch.mul(d_h, h, out=scratch_v).sum(-1).div_(scale).neg_()
        d_overlap = torch.where(overlap.abs() > floor, d_scale * overlap.sign(), 0.0)
        d_h = d_h / scale[..., None]  # from here on: gradient of the numerator

    # Inside the chunk. G = d_weights * weights is the gradient of the log weights: summed over
    # targets at or after t (a triangular product) it gives igate (all sources, t = first row) and
    # fgate (sources before t).
    d_scores = torch.bmm(d_h, value.mT).add_(d_overlap[..., None])
    G = d_scores * weights
    d_scores.mul_(pairs)
    ones = G.new_ones(length, length)
    later = torch.bmm(ones.triu().expand_as(G), G)
    d_log_i = later[:, 0].clone()
    d_log_f = later.mul_(ones.tril(-1)).sum(-1)
    torch.bmm(weights.mT, d_h, out=d_v)

    # Through the state before the chunk.
    torch.mul(d_h, read[..., None], out=scratch_v)
    d_overlap *= read
    torch.bmm(scratch_v, C_before.mT, out=d_q).addcmul_(d_overlap[..., None], n_before[:, None])
    row = torch.mul(query, d_q, out=scratch_k).sum(-1)
    d_log_f += running_sum(row.flip(-1)).flip(-1)
    d_C_before = torch.bmm(query.mT, scratch_v)
    d_n_before = torch.mul(query, d_overlap[..., None], out=scratch_k).sum(1)
    d_C_last, d_n_last = (
        None if x is None else x.to(dtype).reshape(r, -1) for x in (d_C_last, d_n_last)
    )
    d_C_written, d_C = carry_back(transfers, d_C_before.view(r, chunks, -1), d_C_last, need_state)
    d_n_written, d_n = carry_back(transfers, d_n_before.view(r, chunks, -1), d_n_last, need_state)
    d_C_written, d_n_written = d_C_written.view(-1, qk_dim, v_dim), d_n_written.view(-1, qk_dim)

    # Through the state after the chunk, and across the whole chunk.
    write = write[..., None]
    torch.mul(value, write, out=scratch_v)
    torch.bmm(scratch_v, d_C_written.mT, out=d_k).addcmul_(write, d_n_written[:, None])
    column = torch.mul(key, d_k, out=scratch_k).sum(-1)
    d_log_i += column
    d_log_f[:, 1:] += running_sum(column[:, :-1])
    d_v.baddbmm_(torch.mul(key, write, out=scratch_k), d_C_written)
    across = torch.mul(C_before, d_C_written, out=d_C_before).sum((-2, -1))
    across += (n_before * d_n_written).sum(-1)
    keep = log_keep.exp().masked_fill_(starts > 0, 0).to(dtype).view(-1)
    d_log_f += (keep * across)[:, None]

    d_q.baddbmm_(d_scores, key)
    d_k.baddbmm_(d_scores.mT, query)
    for place, result in zip(grads[:3], (d_q, d_k, d_v), strict=True):
        _put(place, result)
    s = f.shape[1]
    d_log_f, d_log_i = (x.view(r, -1)[:, :s] for x in (d_log_f, d_log_i))
    grads.f.copy_(d_log_f.mul_(torch.sigmoid(-f.to(dtype))))
    grads.i.copy_(d_log_i if exp_gate else d_log_i.mul_(torch.sigmoid(-i.to(dtype))))
    if need_state:
        grads.C.copy_(d_C.view(r, qk_dim, v_dim))
        grads.n.copy_(d_n)


@mlstm_backward.register_fake
def _(q, k, v, igate_preact, fgate_preact, d_h, d_C_last, d_n_last, saved, exp_gate, normalize,
      eps, need_state):  # fmt: skip
    grads = _allocate_gradients(q, k, v, igate_preact, fgate_preact, need_state)
    return [x for x in grads if x is not None]


def _save(ctx, inputs, output):
    q, k, v, i, f, C, n, _, _, _, exp_gate, normalize, eps, need_last = inputs
    h, C_last, n_last, m_last, *buffers = output
    ctx.save_for_backward(q, k, v, i, f, h, *buffers)
    ctx.options = exp_gate, normalize, eps
    ctx.state_dtypes = None if C is None else (C.dtype, n.dtype)
    empty = () if need_last else (C_last, n_last)
    ctx.mark_non_differentiable(*empty, m_last, *buffers)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_outputs):
    d_h, d_C_last, d_n_last, *_ = d_outputs
    q, k, v, i, f, h, *buffers = ctx.saved_tensors
    if d_h is None:
        d_h = torch.zeros_like(h)
    grads = mlstm_backward(
        q, k, v, i, f, d_h, d_C_last, d_n_last, [h, *buffers], *ctx.options,
        ctx.state_dtypes is not None,
    )  # fmt: skip
    if ctx.state_dtypes is None:
        grads += [None, None]
    else:
        grads[5:] = [x.to(dtype) for x, dtype in zip(grads[5:], ctx.state_dtypes, strict=True)]
    return *grads, *[None] * 7


mlstm_forward.register_autograd(_differentiate, setup_context=_save)
