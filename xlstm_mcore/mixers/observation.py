"""What a cell did with a micro-batch, for whoever observes it: its gates, state and normaliser.

A mixer whose attribute `observe` is set calls it with `CellValues` in every forward pass. Nothing
here is computed otherwise, and what the cell returns is the same either way.

States are carried as `exp(m) C` and `exp(m) n`, which overflow; so their sizes are natural
logarithms.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST = 1e-37  # a state of zeros has a logarithm too


@dataclass(frozen=True)
class CellValues:
    """One forward pass of a cell on this rank.

    Attributes:
        igate: Pre-activations of the input gate as the cell takes them, of any shape.
        fgate: The same of the forget gate.
        state: Log of the norm of the state after the last token of each row and head, of any shape.
            None on ranks that do not hold the end of the rows.
        normalizer: Log of what the cell divides its output by at that token, of any shape: for the
            mLSTM `log max(exp(m) |n.q|, 1)`, for the sLSTM `log(exp(m) n)` of every channel. None
            likewise, and for cells without a normaliser.
    """

    igate: Tensor
    fgate: Tensor
    state: Tensor | None
    normalizer: Tensor | None


Observer = Callable[[CellValues], None]


@torch.no_grad()
def of_mlstm(
    igate: Tensor,
    fgate: Tensor,
    q: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    *,
    row_ends: bool,
    normalize: bool,
) -> CellValues:
    """What an mLSTM did.

    Args:
        igate: Pre-activations `[b, heads, s]`, with the cap applied.
        fgate: Likewise.
        q: `[b, heads, s, qk_dim]`, not scaled.
        state: `C [b, heads, qk_dim, v_dim]`, `n` and `m` after the last token.
        row_ends: Whether that token is the last of the row.
        normalize: Whether the cell has a normaliser.
    """
    if not row_ends:
        return CellValues(igate, fgate, None, None)
    cell_state, n, m = (part.double() for part in state)
    norm = m + cell_state.flatten(2).norm(dim=-1).clamp(min=_LEAST).log()
    if not normalize:
        return CellValues(igate, fgate, norm, None)
    product = (n * q[:, :, -1].double()).sum(-1).abs() * q.shape[-1] ** -0.5
    return CellValues(igate, fgate, norm, (m + product.clamp(min=_LEAST).log()).clamp(min=0.0))


@torch.no_grad()
def of_slstm(
    gate_preacts: Tensor,
    recurrent_weight: Tensor,
    bias: Tensor,
    h: Tensor,
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    boundaries: Tensor | None,
) -> CellValues:
    """What an sLSTM did; its gates see the hidden state of the token before.

    Args:
        gate_preacts: `[b, s, 4, heads, d]` in the order i, f, z, o, without that part.
        recurrent_weight: `[4, heads, d, d]`.
        bias: `[4, heads, d]`.
        h: Hidden states `[b, s, heads, d]`.
        state: `h`, `c`, `n` and `m`, `[b, heads, d]` each, after the last token.
        boundaries: Bool `[b, s]`, True at the first token of a document, or None.
    """
    before = torch.cat((torch.zeros_like(h[:, :1]), h[:, :-1]), dim=1).float()
    if boundaries is not None:
        before = before.masked_fill(boundaries[:, :, None, None], 0.0)
    seen = torch.einsum("bshd,ghde->bsghe", before, recurrent_weight[:2].float())
    igate, fgate = (gate_preacts[:, :, :2].float() + seen + bias[:2].float()).unbind(2)
    _, c, n, m = (part.double() for part in state)
    size = 0.5 * torch.logsumexp(2 * (m + c.abs().clamp(min=_LEAST).log()), dim=-1)
    return CellValues(igate, fgate, size, m + n.clamp(min=_LEAST).log())
