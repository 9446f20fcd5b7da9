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
from torch.nn.functional import pad

from xlstm_kernels.checks import compute_dtype
from xlstm_kernels.mlstm.decays import ROUNDING, decays_of
from xlstm_kernels.torch_op import torch_op

CHUNK_GROUP = 32  # chunks whose decay matrix is dense; more are carried from group to group

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
    return 32 if qk_dim * v_dim <= 64 * 64 else 64


def _cut(length: int, chunk_size: int) -> tuple[int, int]:
    """Number of chunks and tokens in each: as even as can be, the last one padded."""
    chunks = -(-length // chunk_size)
    return chunks, -(-length // chunks)


def _transfers(log_keep: Tensor, starts: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """For each group of g chunks a matrix T [b * heads, g + 1, g + 1]: S_k = sum_l T[k, l] U_l.

    S_k is the state before chunk k of the group (k = g: after the group), U_0 the state before
    the group and U_l what chunk l - 1 writes. `log_keep` and `starts` are those of `Decays`.
    Groups keep memory linear in the length.
    """
    transfers = []
    for decay, started in zip(
        log_keep.split(CHUNK_GROUP, 1), starts.split(CHUNK_GROUP, 1), strict=True
    ):
        decay, started = (pad(x.cumsum(-1), (1, 0)) for x in (decay, started))
        exponent = (decay[:, :, None] - decay[:, None, :]).clamp_(max=ROUNDING)
        exponent.masked_fill_(started[:, :, None] != started[:, None, :], -torch.inf)
        transfers.append(exponent.exp_().tril_().to(dtype))
    return transfers


def _carry(
    transfers: list[Tensor], written: Tensor, first: Tensor | None, need_last: bool
) -> tuple[Tensor, Tensor | None]:
    """States before each chunk [b * heads, chunks, x] and after the last [b * heads, x].

    `written` [b * heads, chunks, x] is what each chunk writes, `first` [b * heads, x] the initial
    state or None for zeros. The last state is computed if `need_last`.
    """
    before = []
    for group, (T, source) in enumerate(
        zip(transfers, written.split(CHUNK_GROUP, 1), strict=True), start=1
    ):
        states = torch.bmm(T[:, :-1, 1:], source)
        last = None
        if need_last or group < len(transfers):
            last = torch.bmm(T[:, -1:, 1:], source)[:, 0]
        if first is not None:
            states.addcmul_(T[:, :-1, :1], first[:, None])
            last = None if last is None else last.addcmul_(T[:, -1, :1], first)
        before.append(states)
        first = last
    return (before[0] if len(before) == 1 else torch.cat(before, 1)), first


def _carry_back(
    transfers: list[Tensor], d_before: Tensor, d_last: Tensor | None, need_first: bool
) -> tuple[Tensor, Tensor | None]:
    """Transpose of `_carry`: gradients of what each chunk writes and of the initial state."""
    d_written = []
    groups = list(zip(transfers, d_before.split(CHUNK_GROUP, 1), strict=True))
    for group, (T, d_states) in reversed(list(enumerate(groups))):
        d_source = torch.bmm(T[:, :-1, 1:].mT, d_states)
        d_first = None
        if need_first or group > 0:
            d_first = torch.bmm(T[:, :-1, :1].mT, d_states)[:, 0]
        if d_last is not None:
            d_source.addcmul_(T[:, -1, 1:, None], d_last[:, None])
            d_first = None if d_first is None else d_first.addcmul_(T[:, -1, :1], d_last)
        d_written.append(d_source)
        d_last = d_first
    return (d_written[0] if len(d_written) == 1 else torch.cat(d_written[::-1], 1)), d_last


def _by_chunk(x: Tensor, chunks: int, length: int, dtype: torch.dtype) -> Tensor:
    """[b, heads, s, d] as [b * heads * chunks, L, d] in `dtype`, zero beyond the sequence."""
    b, heads, s, d = x.shape
    if x.dtype != dtype or not x.is_contiguous() or s != chunks * length:
        padded = x.new_empty(b, heads, chunks * length, d, dtype=dtype)
        padded[:, :, :s].copy_(x)
        padded[:, :, s:].zero_()
        x = padded
    return x.view(b * heads * chunks, length, d)


class _Forward(NamedTuple):
    """Results of the forward pass: h and the last state, then what the backward pass needs."""

    h: Tensor  # [b, heads, s, v_dim] in the dtype of q
    C_last: Tensor  # the last state; C and n are empty if not asked for
    n_last: Tensor
    m_last: Tensor
    h_wide: Tensor  # [N, L, v_dim] h before rounding to the dtype of q; empty if that is none
    weights: Tensor  # [N, L, L] q.k under `pairs`
    C_before: Tensor  # [N, qk_dim, v_dim] state before each chunk
    n_before: Tensor  # [N, qk_dim]
    overlap: Tensor  # [N, L] n.q
    pairs: Tensor  # and the rest: see Decays
    read: Tensor
    write: Tensor
    floor: Tensor
    log_keep: Tensor
    starts: Tensor


# In both passes a fresh large buffer costs a CPU more than a product with it: `scratch` is reused.


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
    b, heads, s, qk_dim = q.shape
    v_dim = v.shape[-1]
    dtype = compute_dtype(q.dtype)
    chunks, length = _cut(s, chunk_size)
    rows = b * heads
    decays = decays_of(
        igate_preact, fgate_preact, m, boundaries, chunks, length, qk_dim**-0.5, exp_gate, dtype
    )
    transfers = _transfers(decays.log_keep, decays.starts, dtype)
    query, key, value = (_by_chunk(x, chunks, length, dtype) for x in (q, k, v))

    weights = torch.bmm(query, key.mT).mul_(decays.pairs)
    h = torch.bmm(weights, value)
    overlap = weights.sum(-1)

    scratch = key * decays.write[..., None]
    C_written = torch.bmm(scratch.mT, value).view(rows, chunks, -1)
    n_written = scratch.sum(1).view(rows, chunks, -1)
    C = None if C is None else C.to(dtype).reshape(rows, -1)
    n = None if n is None else n.to(dtype).reshape(rows, -1)
    C_before, C_last = _carry(transfers, C_written, C, need_last)
    n_before, n_last = _carry(transfers, n_written, n, need_last)
    C_before, n_before = C_before.view(-1, qk_dim, v_dim), n_before.view(-1, qk_dim)
    torch.mul(query, decays.read[..., None], out=scratch)
    h.baddbmm_(scratch, C_before)
    overlap += scratch.mul_(n_before[:, None]).sum(-1)
    if normalize:
        h.div_((torch.maximum(overlap.abs(), decays.floor) + eps)[..., None])

    none = h.new_empty(0)
    return list(
        _Forward(
            h=h.view(b, heads, chunks * length, v_dim)[:, :, :s].to(q.dtype).contiguous(),
            C_last=C_last.view(b, heads, qk_dim, v_dim) if need_last else none,
            n_last=n_last.view(b, heads, qk_dim) if need_last else none.clone(),
            m_last=decays.last_m,
            h_wide=none.clone() if q.dtype == dtype else h,
            weights=weights,
            C_before=C_before,
            n_before=n_before,
            overlap=overlap,
            pairs=decays.pairs,
            read=decays.read,
            write=decays.write,
            floor=decays.floor,
            log_keep=decays.log_keep,
            starts=decays.starts,
        )
    )


@mlstm_forward.register_fake
def _(q, k, v, igate_preact, fgate_preact, C, n, m, boundaries, chunk_size, exp_gate, normalize,
      eps, need_last):  # fmt: skip
    b, heads, s, qk_dim = q.shape
    v_dim = v.shape[-1]
    dtype = compute_dtype(q.dtype)
    chunks, length = _cut(s, chunk_size)
    N, rows = b * heads * chunks, b * heads

    def new(*shape, dtype=dtype):
        return q.new_empty(shape, dtype=dtype)

    return list(
        _Forward(
            h=new(b, heads, s, v_dim, dtype=q.dtype),
            C_last=new(b, heads, qk_dim, v_dim) if need_last else new(0),
            n_last=new(b, heads, qk_dim) if need_last else new(0),
            m_last=new(b, heads),
            h_wide=new(0) if q.dtype == dtype else new(N, length, v_dim),
            weights=new(N, length, length),
            C_before=new(N, qk_dim, v_dim),
            n_before=new(N, qk_dim),
            overlap=new(N, length),
            pairs=new(N, length, length),
            read=new(N, length),
            write=new(N, length),
            floor=new(N, length),
            log_keep=new(rows, chunks, dtype=torch.float64),
            starts=new(rows, chunks, dtype=torch.float64),
        )
    )


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
    (h, h_wide, weights, C_before, n_before, overlap, pairs, read, write, floor, log_keep,
     starts) = saved  # fmt: skip
    b, heads, s, qk_dim = q.shape
    v_dim, dtype, rows = v.shape[-1], weights.dtype, b * heads
    chunks, length = log_keep.shape[1], weights.shape[1]
    transfers = _transfers(log_keep, starts, dtype)
    query, key, value, d_h = (_by_chunk(x, chunks, length, dtype) for x in (q, k, v, d_h))
    h = _by_chunk(h, chunks, length, dtype) if h_wide.numel() == 0 else h_wide
    scratch_k, scratch_v = torch.empty_like(query), torch.empty_like(value)

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
    d_v = torch.bmm(weights.mT, d_h)

    # Through the state before the chunk.
    torch.mul(d_h, read[..., None], out=scratch_v)
    d_overlap *= read
    d_q = torch.bmm(scratch_v, C_before.mT).addcmul_(d_overlap[..., None], n_before[:, None])
    row = torch.mul(query, d_q, out=scratch_k).sum(-1)
    d_log_f += row.flip(-1).cumsum(-1).flip(-1)
    d_C_before = torch.bmm(query.mT, scratch_v)
    d_n_before = torch.mul(query, d_overlap[..., None], out=scratch_k).sum(1)
    d_C_last = None if d_C_last is None else d_C_last.to(dtype).reshape(rows, -1)
    d_n_last = None if d_n_last is None else d_n_last.to(dtype).reshape(rows, -1)
    d_C_written, d_C = _carry_back(
        transfers, d_C_before.view(rows, chunks, -1), d_C_last, need_state
    )
    d_n_written, d_n = _carry_back(
        transfers, d_n_before.view(rows, chunks, -1), d_n_last, need_state
    )
    d_C_written, d_n_written = d_C_written.view(-1, qk_dim, v_dim), d_n_written.view(-1, qk_dim)

    # Through the state after the chunk, and across the whole chunk.
    write = write[..., None]
    torch.mul(value, write, out=scratch_v)
    d_k = torch.bmm(scratch_v, d_C_written.mT).addcmul_(write, d_n_written[:, None])
    column = torch.mul(key, d_k, out=scratch_k).sum(-1)
    d_log_i += column
    d_log_f[:, 1:] += column[:, :-1].cumsum(-1)
    d_v.baddbmm_(torch.mul(key, write, out=scratch_k), d_C_written)
    across = torch.mul(C_before, d_C_written, out=d_C_before).sum((-2, -1))
    across += (n_before * d_n_written).sum(-1)
    keep = log_keep.exp().masked_fill_(starts > 0, 0).to(dtype).view(-1)
    d_log_f += (keep * across)[:, None]

    d_q.baddbmm_(d_scores, key)
    d_k.baddbmm_(d_scores.mT, query)

    def cut(x, *last, to=dtype):
        return x.view(b, heads, chunks * length, *last)[:, :, :s].to(to).contiguous()

    d_fgate = cut(d_log_f).mul_(torch.sigmoid(-fgate_preact.to(dtype)))
    d_igate = cut(d_log_i)
    if not exp_gate:
        d_igate.mul_(torch.sigmoid(-igate_preact.to(dtype)))
    grads = [
        cut(d_q, qk_dim, to=q.dtype),
        cut(d_k, qk_dim, to=q.dtype),
        cut(d_v, v_dim, to=q.dtype),
    ]
    grads += [d_igate.to(igate_preact.dtype), d_fgate.to(fgate_preact.dtype)]
    if need_state:
        grads += [d_C.view(b, heads, qk_dim, v_dim), d_n.view(b, heads, qk_dim)]
    return grads


@mlstm_backward.register_fake
def _(q, k, v, igate_preact, fgate_preact, d_h, d_C_last, d_n_last, saved, exp_gate, normalize,
      eps, need_state):  # fmt: skip
    def contiguous(x):
        return x.new_empty(x.shape)

    grads = [contiguous(x) for x in (q, k, v, igate_preact, fgate_preact)]
    if need_state:
        b, heads, _, qk_dim = q.shape
        dtype = compute_dtype(q.dtype)
        grads.append(q.new_empty(b, heads, qk_dim, v.shape[-1], dtype=dtype))
        grads.append(q.new_empty(b, heads, qk_dim, dtype=dtype))
    return grads


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
