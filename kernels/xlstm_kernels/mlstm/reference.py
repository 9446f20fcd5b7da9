"""The mLSTM step recurrence, one token at a time: the specification of every other mLSTM kernel.

xLSTM (arXiv 2405.04517), eq. 19-27, with the sigmoid forget gate. Written to be read and to be
run in float64; autograd through it gives the reference gradients.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from xlstm_kernels.mlstm.arguments import State


def mlstm_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    initial_state: State | None = None,
    *,
    boundaries: Tensor | None = None,
    gate: str = "exp",
    normalize: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, State]:
    """Hidden states [b, heads, s, v_dim] and last state (C, n, m), in the dtype of `q`.

    Arguments as in `xlstm_kernels.mlstm_chunkwise`. m carries no gradient: h and the carried
    quantities exp(m) C and exp(m) n do not depend on it (for eps = 0).
    """
    C = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    n, m = C[..., 0], C[..., 0, 0]
    if initial_state is not None:
        C, n, m = initial_state
        m = m.detach() if gate == "exp" else torch.zeros_like(m)
    log_f = logsigmoid(fgate_preact)
    log_i = igate_preact if gate == "exp" else logsigmoid(igate_preact)
    h = []
    for t in range(q.shape[2]):
        if boundaries is not None:  # a document starts: its rows go on from the empty state
            keep = (~boundaries[:, t]).to(q.dtype)[:, None]
            C, n, m = C * keep[..., None, None], n * keep[..., None], m * keep
        m_new = m if gate == "sigmoid" else torch.maximum(log_f[..., t] + m, log_i[..., t]).detach()
        f = (log_f[..., t] + m - m_new).exp()[..., None]  # the stabilized gates
        i = (log_i[..., t] - m_new).exp()[..., None]
        C = f[..., None] * C + (i * k[..., t, :])[..., None] * v[..., t, None, :]
        n = f * n + i * k[..., t, :]
        m = m_new
        query = q[..., t, :] * q.shape[-1] ** -0.5
        numerator = (query[..., None, :] @ C).squeeze(-2)
        nq = (query * n).sum(-1, keepdim=True)
        normalizer = torch.maximum(nq.abs(), (-m).exp()[..., None]) + eps
        h.append(numerator / normalizer if normalize else numerator)
    return torch.stack(h, dim=2), (C, n, m)
