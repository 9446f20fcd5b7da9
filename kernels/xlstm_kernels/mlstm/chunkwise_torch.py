"""MLSTM in chunkwise-parallel form with torch operations, forward and backward by hand.

Inside a chunk of L tokens the cell is a decay-weighted L x L attention; chunks exchange states
(C, n), and all states follow from one chunk-by-chunk matrix of decays, so that there is no loop
over chunks. Products are batched over b * heads * chunks.

Precision. m depends on the gates only, so it is known before the first product: no rescaling, and
the same m for every chunk size. All gate sums are float64: they are small ([b, heads, s]), and a
float32 sum of 64 closed gates (-15 each) would cost 1e-4 in every weight after them. Gradients of
the forget gate add up exactly the pairs (source before t, target at or after t), without the
cancellation of the usual reversed cumulative sum of q.dq - k.dk.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid, pad

from xlstm_kernels.checks import compute_dtype

CHUNK_GROUP = 32  # chunks whose decay matrix is dense; more are carried from group to group

# By the choice of m no exponent exceeds 0, but for the rounding of m: below 1 up to |m| = 1e7.
# Beyond, gates have lost their meaning, and this bound keeps their exponentials finite.
ROUNDING = 1.0

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
    options = _Options(
        chunk_size or _default_chunk_size(q.shape[-1], v.shape[-1]),
        return_last_state,
        gate == "exp",
        normalize,
        eps,
    )
    h, *state = _Chunkwise.apply(q, k, v, igate_preact, fgate_preact, C, n, m, boundaries, options)
    return (h, tuple(state)) if return_last_state else h


def _default_chunk_size(qk_dim: int, v_dim: int) -> int:
    """Fastest of 32, 64, 128 measured on a CPU: small heads make states cheap, pairs dear."""
    return 32 if qk_dim * v_dim <= 64 * 64 else 64


class _Options(NamedTuple):
    chunk_size: int
    return_last_state: bool
    exp_gate: bool
    normalize: bool
    eps: float


class _Decays(NamedTuple):
    """Everything that gates decide; N = b * heads * chunks."""

    pairs: Tensor  # [N, L, L] weight of source j in target i, with 1/sqrt(qk_dim), causal
    read: Tensor  # [N, L] weight of the state before the chunk in target i, with 1/sqrt(qk_dim)
    write: Tensor  # [N, L] weight of source j in the state after the chunk
    keep: Tensor  # [N] decay of the state over the chunk
    transfers: list[Tensor]  # decay matrices between chunks, see _transfers
    floor: Tensor  # [N, L] exp(-m), the lower bound of the normaliser
    last_m: Tensor  # [b, heads]


def stabilizer(log_f: Tensor, log_i: Tensor, m: Tensor | None, boundaries: Tensor | None) -> Tensor:
    """Running maximum m_t = max(log_f_t + m_{t-1}, log_i_t) over the last axis, m = 0 when fresh.

    A max-plus scan in log2(s) steps: the pair (total, best) of a span of tokens maps the m before
    it to max(total + m, best) after it. A span that holds a start has total = -inf.
    """
    m = torch.zeros_like(log_f[..., :1]) if m is None else m[..., None].to(log_f)
    total, best = log_f.clone(), log_i.clone()
    if boundaries is not None:
        m = m.masked_fill(boundaries[:, None, :1], 0.0)
        starts = boundaries[:, None].expand_as(log_f)
        best = torch.where(starts, torch.maximum(log_f, log_i), best)
        total.masked_fill_(starts, -torch.inf)
    best[..., :1] = torch.maximum(log_f[..., :1] + m, log_i[..., :1])
    total[..., 0] = -torch.inf
    span, length = 1, log_f.shape[-1]
    while span < length:
        joined = torch.maximum(total[..., span:] + best[..., :-span], best[..., span:])
        total[..., span:] = total[..., span:] + total[..., :-span]
        best[..., span:] = joined
        span *= 2
    return best


def _decays(
    igate_preact: Tensor,
    fgate_preact: Tensor,
    m: Tensor | None,
    boundaries: Tensor | None,
    chunks: int,
    length: int,
    scale: float,
    exp_gate: bool,
    dtype: torch.dtype,
) -> _Decays:
    """Weights of a sequence cut into `chunks` chunks of `length` tokens (padded at its end)."""
    b, heads, s = fgate_preact.shape
    log_f = logsigmoid(fgate_preact.double())
    log_i = igate_preact.double() if exp_gate else logsigmoid(igate_preact.double())
    if exp_gate:
        # Rounded before it is used, so that the returned m and C belong together.
        m_all = stabilizer(log_f, log_i, m, boundaries).to(dtype).double()
        m_before = log_f.new_zeros(b, heads) if m is None else m.double()
    else:
        m_all, m_before = torch.zeros_like(log_f), log_f.new_zeros(b, heads)

    extra = chunks * length - s  # padded tokens: no decay, and k = v = 0 write nothing
    by_chunk = (b, heads, chunks, length)
    m_all = torch.cat([m_all, m_all[..., -1:].expand(b, heads, extra)], -1).view(by_chunk)
    log_i = pad(log_i, (0, extra)).view(by_chunk)
    if boundaries is not None:
        log_f = log_f.masked_fill(boundaries[:, None], 0.0)  # no weight crosses a boundary
        started = pad(boundaries, (0, extra)).view(b, 1, chunks, length).cumsum(-1)
    sums = pad(log_f, (0, extra)).view(by_chunk).cumsum(-1)
    m_end = m_all[..., -1]
    m_start = torch.cat([m_before[..., None], m_end[..., :-1]], -1)

    causal = log_f.new_full((length, length), -torch.inf).triu(1) + ROUNDING
    if boundaries is not None:
        causal = causal.expand(b, 1, chunks, length, length).masked_fill(
            started[..., :, None] != started[..., None, :], -torch.inf
        )
    log_scale = torch.tensor(scale, dtype=torch.float64).log()
    target, source = sums - m_all, log_i - sums
    exponent = (target + log_scale)[..., :, None] + source[..., None, :]
    pairs = torch.minimum(exponent, causal, out=exponent).to(dtype).exp_()
    read = (target + m_start[..., None]).clamp(max=ROUNDING).exp() * scale
    write = (source + (sums[..., -1] - m_end)[..., None]).clamp(max=ROUNDING).exp()
    chunk = (sums[..., -1] + m_start - m_end).clamp(max=ROUNDING)
    resets = torch.zeros_like(chunk)
    if boundaries is not None:
        read = read.masked_fill(started > 0, 0.0)
        write = write.masked_fill(started != started[..., -1:], 0.0)
        resets += started[..., -1]
    return _Decays(
        pairs=pairs.view(-1, length, length),
        read=read.to(dtype).reshape(-1, length),
        write=write.to(dtype).reshape(-1, length),
        keep=chunk.exp().masked_fill_(resets > 0, 0).to(dtype).view(-1),
        transfers=_transfers(chunk.view(-1, chunks), resets.view(-1, chunks), dtype),
        # e^-80 instead of 0: no 0 / 0 where eps = 0 and q is orthogonal to n.
        floor=(-m_all).clamp(min=-80).exp().to(dtype).view(-1, length),
        last_m=m_end[..., -1].to(dtype),
    )


def _transfers(chunk: Tensor, resets: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """For each group of g chunks a matrix T [b * heads, g + 1, g + 1]: S_k = sum_l T[k, l] U_l.

    S_k is the state before chunk k of the group (k = g: after the group), U_0 the state before
    the group and U_l what chunk l - 1 writes. `chunk` [b * heads, chunks] is the log decay over
    each chunk, `resets` the number of boundaries in it. Groups keep memory linear in the length.
    """
    transfers = []
    for log_decay, starts in zip(
        chunk.split(CHUNK_GROUP, 1), resets.split(CHUNK_GROUP, 1), strict=True
    ):
        log_decay = pad(log_decay.cumsum(-1), (1, 0))
        starts = pad(starts.cumsum(-1), (1, 0))
        exponent = (log_decay[:, :, None] - log_decay[:, None, :]).clamp_(max=ROUNDING)
        exponent.masked_fill_(starts[:, :, None] != starts[:, None, :], -torch.inf)
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


class _Chunkwise(torch.autograd.Function):
    """On a CPU a fresh large buffer costs more than a product with it: `scratch` is reused."""

    @staticmethod
    def forward(ctx, q, k, v, igate_preact, fgate_preact, C, n, m, boundaries, options):
        b, heads, s, qk_dim = q.shape
        v_dim = v.shape[-1]
        dtype = compute_dtype(q.dtype)
        chunks = -(-s // options.chunk_size)
        length = -(-s // chunks)
        rows = b * heads
        decays = _decays(
            igate_preact, fgate_preact, m, boundaries, chunks, length, qk_dim**-0.5,
            options.exp_gate, dtype,
        )  # fmt: skip
        query, key, value = (_by_chunk(x, chunks, length, dtype) for x in (q, k, v))

        weights = torch.bmm(query, key.mT).mul_(decays.pairs)
        h = torch.bmm(weights, value)
        overlap = weights.sum(-1)  # n.q

        scratch = key * decays.write[..., None]
        C_written = torch.bmm(scratch.mT, value).view(rows, chunks, -1)
        n_written = scratch.sum(1).view(rows, chunks, -1)
        C = None if C is None else C.to(dtype).reshape(rows, -1)
        n = None if n is None else n.to(dtype).reshape(rows, -1)
        C_before, C_last = _carry(decays.transfers, C_written, C, options.return_last_state)
        n_before, n_last = _carry(decays.transfers, n_written, n, options.return_last_state)
        C_before, n_before = C_before.view(-1, qk_dim, v_dim), n_before.view(-1, qk_dim)
        torch.mul(query, decays.read[..., None], out=scratch)
        h.baddbmm_(scratch, C_before)
        overlap += scratch.mul_(n_before[:, None]).sum(-1)

        scale = None
        if options.normalize:
            scale = torch.maximum(overlap.abs(), decays.floor) + options.eps
            h.div_(scale[..., None])
        ctx.save_for_backward(
            query, key, value, weights, C_before, n_before, h, overlap, scale,
            igate_preact, fgate_preact,
        )  # fmt: skip
        ctx.decays, ctx.options, ctx.dims = decays, options, (b, heads, s, chunks, length)
        ctx.set_materialize_grads(False)
        out = h.view(b, heads, chunks * length, v_dim)[:, :, :s].to(q.dtype)
        if not options.return_last_state:
            return (out,)
        ctx.mark_non_differentiable(decays.last_m)
        state = C_last.view(b, heads, qk_dim, v_dim), n_last.view(b, heads, qk_dim)
        return out, *state, decays.last_m

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_C_last=None, d_n_last=None, _=None):
        (query, key, value, weights, C_before, n_before, h, overlap, scale,
         igate_preact, fgate_preact) = ctx.saved_tensors  # fmt: skip
        decays = ctx.decays
        b, heads, s, chunks, length = ctx.dims
        rows, dtype, qk_dim, v_dim = b * heads, query.dtype, query.shape[-1], value.shape[-1]
        read, write = decays.read[..., None], decays.write[..., None]
        scratch_k, scratch_v = torch.empty_like(query), torch.empty_like(value)
        if d_out is None:
            d_out = h.new_zeros(b, heads, s, v_dim)

        d_h = _by_chunk(d_out, chunks, length, dtype)
        d_overlap = torch.zeros_like(overlap)
        if ctx.options.normalize:
            d_scale = torch.mul(d_h, h, out=scratch_v).sum(-1).div_(scale).neg_()
            d_overlap = torch.where(overlap.abs() > decays.floor, d_scale * overlap.sign(), 0.0)
            d_h = d_h / scale[..., None]  # from here on: gradient of the numerator

        # Inside the chunk. G = d_weights * weights is the gradient of the log weights: summed over
        # targets at or after t (a triangular product) it gives igate (all sources, t = first row)
        # and fgate (sources before t).
        d_scores = torch.bmm(d_h, value.mT).add_(d_overlap[..., None])
        G = d_scores * weights
        d_scores.mul_(decays.pairs)
        ones = G.new_ones(length, length)
        later = torch.bmm(ones.triu().expand_as(G), G)
        d_log_i = later[:, 0].clone()
        d_log_f = later.mul_(ones.tril(-1)).sum(-1)
        d_v = torch.bmm(weights.mT, d_h)

        # Through the state before the chunk.
        torch.mul(d_h, read, out=scratch_v)
        d_overlap *= decays.read
        d_q = torch.bmm(scratch_v, C_before.mT).addcmul_(d_overlap[..., None], n_before[:, None])
        row = torch.mul(query, d_q, out=scratch_k).sum(-1)
        d_log_f += row.flip(-1).cumsum(-1).flip(-1)
        d_C_before = torch.bmm(query.mT, scratch_v)
        d_n_before = torch.mul(query, d_overlap[..., None], out=scratch_k).sum(1)
        d_C_last = None if d_C_last is None else d_C_last.to(dtype).reshape(rows, -1)
        d_n_last = None if d_n_last is None else d_n_last.to(dtype).reshape(rows, -1)
        d_C_written, d_C = _carry_back(
            decays.transfers, d_C_before.view(rows, chunks, -1), d_C_last, ctx.needs_input_grad[5]
        )
        d_n_written, d_n = _carry_back(
            decays.transfers, d_n_before.view(rows, chunks, -1), d_n_last, ctx.needs_input_grad[6]
        )
        d_C_written, d_n_written = d_C_written.view(-1, qk_dim, v_dim), d_n_written.view(-1, qk_dim)

        # Through the state after the chunk, and across the whole chunk.
        torch.mul(value, write, out=scratch_v)
        d_k = torch.bmm(scratch_v, d_C_written.mT).addcmul_(write, d_n_written[:, None])
        column = torch.mul(key, d_k, out=scratch_k).sum(-1)
        d_log_i += column
        d_log_f[:, 1:] += column[:, :-1].cumsum(-1)
        d_v.baddbmm_(torch.mul(key, write, out=scratch_k), d_C_written)
        across = torch.mul(C_before, d_C_written, out=d_C_before).sum((-2, -1))
        across += (n_before * d_n_written).sum(-1)
        d_log_f += (decays.keep * across)[:, None]

        d_q.baddbmm_(d_scores, key)
        d_k.baddbmm_(d_scores.mT, query)

        def cut(x, *last, to=d_out.dtype):
            return x.view(b, heads, chunks * length, *last)[:, :, :s].to(to)

        d_fgate = cut(d_log_f, to=dtype) * torch.sigmoid(-fgate_preact.to(dtype))
        d_igate = cut(d_log_i, to=dtype)
        if not ctx.options.exp_gate:
            d_igate = d_igate * torch.sigmoid(-igate_preact.to(dtype))
        return (
            cut(d_q, qk_dim), cut(d_k, qk_dim), cut(d_v, v_dim),
            d_igate.to(igate_preact.dtype), d_fgate.to(fgate_preact.dtype),
            None if d_C is None else d_C.view(b, heads, qk_dim, v_dim),
            None if d_n is None else d_n.view(b, heads, qk_dim),
            None, None, None,
        )  # fmt: skip
