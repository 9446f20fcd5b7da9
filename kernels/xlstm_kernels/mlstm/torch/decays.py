"""What the gates of an mLSTM decide in chunkwise-parallel form: all weights and decays.

The names are those of Tiled Flash Linear Attention (arXiv 2503.14376, section 3 and appendix): the
matrix D within a chunk, the vectors b and a between tokens and states, the decay g of a chunk.

The stabilizer m depends on the gates only, so it is known before the first product: no rescaling,
and the same m for every chunk size. All gate sums are float64: they are small ([b, heads, s]), and
a float32 sum of 64 closed gates (-15 each) would cost 1e-4 in every weight after them.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from xlstm_kernels.common.cumulative_sum import cumulative_sum
from xlstm_kernels.common.gates import log_forget_gate

# By the choice of m no exponent exceeds 0, but for the rounding of m: below 1 up to |m| = 1e7.
# Beyond, gates have lost their meaning, and this bound keeps their exponentials finite.
ROUNDING = 1.0


class Decays(NamedTuple):
    """Everything that gates decide; N = b * heads * chunks, L tokens in a chunk.

    D and b_bar contain the factor 1/sqrt(qk_dim) of the query.
    """

    D: Tensor  # [N, L, L] weight of source token j in target token i, causal
    b_bar: Tensor  # [N, L] weight of the state before the chunk in target token i
    a_bar: Tensor  # [N, L] weight of source token j in the state after the chunk
    least_normalizer: Tensor  # [N, L] exp(-m)
    log_g: Tensor  # [b * heads, chunks] log decay of the state over each chunk, float64
    starts: Tensor  # [b * heads, chunks] number of documents that start in the chunk, float64
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


def decays_of(
    igate_preact: Tensor,
    fgate_preact: Tensor,
    m: Tensor | None,
    boundaries: Tensor | None,
    *,
    D: Tensor,
    scale: float,
    exp_gate: bool,
) -> Decays:
    """Weights of a sequence that is cut into chunks of equal length (padded at its end).

    Args:
        igate_preact: [b, heads, s].
        fgate_preact: [b, heads, s].
        m: [b, heads] of the initial state; None means zeros.
        boundaries: bool [b, s], True at the first token of a document; or None.
        D: Memory [b * heads, chunks, L, L] for `Decays.D`. Its dtype is that of the results.
        scale: 1/sqrt(qk_dim).
        exp_gate: Whether the input gate is exponential, not a sigmoid.
    """
    b, heads, s = fgate_preact.shape
    chunks, length = D.shape[1:3]
    dtype = D.dtype
    log_f = log_forget_gate(fgate_preact)
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
    sums = cumulative_sum(pad(log_f, (0, extra)).view(by_chunk))
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
    D = D.view(exponent.shape).copy_(torch.minimum(exponent, causal, out=exponent)).exp_()
    b_bar = (target + m_start[..., None]).clamp(max=ROUNDING).exp() * scale
    a_bar = (source + (sums[..., -1] - m_end)[..., None]).clamp(max=ROUNDING).exp()
    log_g = (sums[..., -1] + m_start - m_end).clamp(max=ROUNDING)
    starts = torch.zeros_like(log_g)
    if boundaries is not None:
        b_bar = b_bar.masked_fill(started > 0, 0.0)
        a_bar = a_bar.masked_fill(started != started[..., -1:], 0.0)
        starts += started[..., -1]
    return Decays(
        D=D.view(-1, length, length),
        b_bar=b_bar.to(dtype).reshape(-1, length),
        a_bar=a_bar.to(dtype).reshape(-1, length),
        # e^-80 instead of 0: no 0 / 0 where eps = 0 and q is orthogonal to n.
        least_normalizer=(-m_all).clamp(min=-80).exp().to(dtype).view(-1, length),
        log_g=log_g.view(-1, chunks),
        starts=starts.view(-1, chunks),
        last_m=m_end[..., -1].to(dtype),
    )
