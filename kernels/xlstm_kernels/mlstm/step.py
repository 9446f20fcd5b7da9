"""The mLSTM for one token, as generation uses it."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from xlstm_kernels.common.backends import select_backend
from xlstm_kernels.common.checks import check_no_tangents, compute_dtype
from xlstm_kernels.common.gates import CLOSED
from xlstm_kernels.mlstm.arguments import State, check_arguments, check_soft_cap, soft_cap


@torch.no_grad()
def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    state: State,
    *,
    gate: str = "exp",
    normalize: bool = True,
    eps: float = 1e-6,
    gate_soft_cap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Hidden state of one token; the state is updated in place.

    The equations and options are those of `mlstm_chunkwise`. No gradient is recorded.

    Args:
        q: [b, heads, qk_dim].
        k: [b, heads, qk_dim].
        v: [b, heads, v_dim].
        igate_preact: Pre-activation of the input gate, [b, heads].
        fgate_preact: Pre-activation of the forget gate, [b, heads].
        state: (C [b, heads, qk_dim, v_dim], n [b, heads, qk_dim], m [b, heads]); changed in place.
        gate: Input gate, "exp" or "sigmoid".
        normalize: Whether the numerator is divided by the normalizer.
        eps: Added to the normalizer.
        gate_soft_cap: Soft cap of both gate pre-activations, or None.
        backend: "torch" or "triton"; None for the best one.

    Returns:
        h [b, heads, v_dim] in the dtype of q.

    Raises:
        ValueError: For wrong shapes, dtypes, devices or options, and for a missing state.
        NotImplementedError: For forward-mode differentiation.
    """
    if state is None:
        raise ValueError("state=None cannot be updated in place; pass zeros for an empty state")
    check_arguments(q, k, v, igate_preact, fgate_preact, state, gate, time=False)
    check_no_tangents("mlstm_step", q, k, v, igate_preact, fgate_preact, *state)
    check_soft_cap(gate_soft_cap)
    qk_dim, v_dim = q.shape[-1], v.shape[-1]
    if select_backend("mlstm_step", backend, q, qk_dim=qk_dim, v_dim=v_dim) == "triton":
        from xlstm_kernels.mlstm.triton.step import mlstm_step_triton

        options = {"gate": gate, "normalize": normalize, "eps": eps, "gate_soft_cap": gate_soft_cap}
        return mlstm_step_triton(q, k, v, igate_preact, fgate_preact, state, **options)
    igate, fgate = (soft_cap(x, gate_soft_cap, q) for x in (igate_preact, fgate_preact))
    with torch.autocast(q.device.type, enabled=False):
        return _step(q, k, v, igate, fgate, state, gate, normalize, eps)


def _step(q, k, v, igate_preact, fgate_preact, state, gate, normalize, eps):
    C, n, m = state
    dtype = compute_dtype(q.dtype)
    query, key, value = q.to(dtype) * q.shape[-1] ** -0.5, k.to(dtype), v.to(dtype)
    log_f = logsigmoid(fgate_preact.to(dtype).clamp(min=CLOSED))
    log_i = igate_preact.to(dtype)
    if gate == "exp":
        m_new = torch.maximum(log_f + m, log_i)
        f, i = (log_f + m - m_new).exp(), (log_i - m_new).exp()
    else:
        m_new, f, i = torch.zeros_like(log_i), log_f.exp(), log_i.sigmoid()
    written = i[..., None] * key
    C.mul_(f[..., None, None]).addcmul_(written[..., None], value[..., None, :])
    n.mul_(f[..., None]).add_(written)
    m.copy_(m_new)
    h = (query[..., None, :] @ C.to(dtype)).squeeze(-2)
    if normalize:
        nq = (query * n).sum(-1)
        # e^-80 instead of 0: no 0 / 0 where eps = 0 and q is orthogonal to n.
        h = h / (torch.maximum(nq.abs(), (-m_new).clamp(min=-80).exp()) + eps)[..., None]
    return h.to(q.dtype)
