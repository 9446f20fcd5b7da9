"""The step recurrences of sLSTM and LSTM, one token at a time: the specification of the kernels.

xLSTM (arXiv 2405.04517), eq. 8-17 for the sLSTM and eq. 2-7 for the LSTM. Written to be read and to
be run in float64; autograd through them gives the reference gradients.
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
    input_gate: str = "exp",
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
        log_i = i if input_gate == "exp" else logsigmoid(i)
        m_new = torch.maximum(log_f + m, log_i).detach()
        decay, write = (log_f + m - m_new).exp(), (log_i - m_new).exp()
        c = decay * c + write * z.tanh()
        n = decay * n + write
        m = m_new
        h = o.sigmoid() * c / n
        hs.append(h)
    return torch.stack(hs, dim=1), (h, c, n, m)


def lstm_recurrence(
    gate_preacts: Tensor,
    recurrent_weight: Tensor,
    bias: Tensor,
    initial_state: tuple[Tensor, Tensor] | None = None,
    *,
    boundaries: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Hidden states h [b, s, heads, d] and last state (h, c), in the dtype of the input.

    Arguments as in `xlstm_kernels.lstm_scan`.
    """
    h = c = gate_preacts.new_zeros(gate_preacts[:, 0, 0].shape)
    if initial_state is not None:
        h, c = initial_state
    hs = []
    for t in range(gate_preacts.shape[1]):
        if boundaries is not None:
            start = boundaries[:, t, None, None]
            h, c = h.masked_fill(start, 0.0), c.masked_fill(start, 0.0)
        recurrent = torch.einsum("bhd,ghde->bghe", h, recurrent_weight)
        i, f, z, o = (gate_preacts[:, t] + recurrent + bias).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * z.tanh()
        h = o.sigmoid() * c.tanh()
        hs.append(h)
    return torch.stack(hs, dim=1), (h, c)
