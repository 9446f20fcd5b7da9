"""States of an mLSTM from chunk to chunk, forward and backward, without a loop over chunks."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from xlstm_kernels.common.cumulative_sum import cumulative_sum
from xlstm_kernels.mlstm.torch.decays import ROUNDING

CHUNK_GROUP = 32  # chunks whose decay matrix is dense; more are carried from group to group


def transfers_of(log_g: Tensor, starts: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """For each group of g chunks a matrix T [b * heads, g + 1, g + 1]: S_k = sum_l T[k, l] U_l.

    S_k is the state before chunk k of the group (k = g: after the group), U_0 the state before
    the group and U_l what chunk l - 1 writes. `log_g` and `starts` are those of `Decays`.
    Groups keep memory linear in the length.
    """
    transfers = []
    for decay, started in zip(
        log_g.split(CHUNK_GROUP, 1), starts.split(CHUNK_GROUP, 1), strict=True
    ):
        decay, started = (pad(cumulative_sum(x), (1, 0)) for x in (decay, started))
        exponent = (decay[:, :, None] - decay[:, None, :]).clamp_(max=ROUNDING)
        exponent.masked_fill_(started[:, :, None] != started[:, None, :], -torch.inf)
        transfers.append(exponent.exp_().tril_().to(dtype))
    return transfers


def carry(
    transfers: list[Tensor],
    written: Tensor,
    first: Tensor | None,
    need_last: bool,
    before: Tensor,
) -> Tensor | None:
    """State after the last chunk [r, x], if `need_last`; those before each chunk go to `before`.

    `written` and `before` [r, chunks, x], the former what each chunk writes; `first` [r, x] is the
    initial state or None for zeros.
    """
    groups = zip(
        transfers, written.split(CHUNK_GROUP, 1), before.split(CHUNK_GROUP, 1), strict=True
    )
    for group, (T, source, states) in enumerate(groups, start=1):
        if first is None:
            torch.bmm(T[:, :-1, 1:], source, out=states)
        else:
            torch.mul(T[:, :-1, :1], first[:, None], out=states)
            states.baddbmm_(T[:, :-1, 1:], source)
        last = None
        if need_last or group < len(transfers):
            last = torch.bmm(T[:, -1:, 1:], source)[:, 0]
            last = last if first is None else last.addcmul_(T[:, -1, :1], first)
        first = last
    return first


def carry_back(
    transfers: list[Tensor], d_before: Tensor, d_last: Tensor | None, need_first: bool
) -> tuple[Tensor, Tensor | None]:
    """Transpose of `carry`: gradients of what each chunk writes and of the initial state."""
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
