"""The sLSTM step recurrence, one token at a time: the specification of every other sLSTM kernel.

xLSTM (arXiv 2405.04517), eq. 8-17. Written to be read and to be run in float64; autograd through
it gives the reference gradients.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from xlstm_kernels.slstm.arguments import State


def slstm_recurrence(
    gate_preacts: Tensor,
    recurrent_weight: Tensor,
    bias: Tensor,
    initial_state: State | None = None,
    *,
    boundaries: Tensor | None = None,
    forget_gate: str = "sigmoid",
) -> tuple[Tensor, State]:
    """Hidden states h [b, s, heads, d] and last state (h, c, n, m), in the dtype of the input.

    Arguments as in `xlstm_kernels.slstm_scan`. m carries no gradient: h does not depend on it.
    """
    h = c = n = gate_preacts.new_zeros(gate_preacts[:, 0, 0].shape)
    m = torch.full_like(h, -torch.inf)
    if initial_state is not None:
        h, c, n, m = initial_state
        m = m.detach().masked_fill(n == 0, -torch.inf)  # an empty memory has no scale
    hs = []
    for t in range(gate_preacts.shape[1]):
        if boundaries is not None:  # a document starts: its rows go on from the empty state
            start = boundaries[:, t, None, None]
            h, c, n = (x.masked_fill(start, 0.0) for x in (h, c, n))
            m = m.masked_fill(start, -torch.inf)
        recurrent = torch.einsum("bhd,ghde->bghe", h, recurrent_weight)
        i, f, z, o = (gate_preacts[:, t] + recurrent + bias).unbind(1)
        log_f = logsigmoid(f) if forget_gate == "sigmoid" else f
        m_new = torch.maximum(log_f + m, i).detach()
        decay, write = (log_f + m - m_new).exp(), (i - m_new).exp()
        c = decay * c + write * z.tanh()
        n = decay * n + write
        m = m_new
        h = o.sigmoid() * c / n
        hs.append(h)
    return torch.stack(hs, dim=1), (h, c, n, m)
