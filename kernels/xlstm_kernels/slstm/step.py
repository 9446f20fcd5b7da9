"""SLSTM for one token, as generation uses it."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from xlstm_kernels.common.backends import select_backend
from xlstm_kernels.common.checks import compute_dtype
from xlstm_kernels.slstm.arguments import State, check_arguments


@torch.no_grad()
def slstm_step(
    gate_preacts: Tensor,
    recurrent_weight: Tensor,
    bias: Tensor,
    state: State,
    *,
    forget_gate: str = "sigmoid",
    backend: str | None = None,
) -> Tensor:
    """Hidden state h [b, heads, d] of one token; `state` (h, c, n, m) is updated in place.

    gate_preacts [b, 4, heads, d]; the same equations and options as `slstm_scan`. A state of
    zeros is a fresh one. No gradient is recorded. Raises ValueError for wrong shapes, dtypes,
    devices or options, and for a missing state.
    """
    if state is None:
        raise ValueError("state=None cannot be updated in place; pass zeros for an empty state")
    check_arguments(gate_preacts, recurrent_weight, bias, state, forget_gate, time=False)
    d = gate_preacts.shape[-1]
    if select_backend("slstm_step", backend, gate_preacts, d=d) == "triton":
        from xlstm_kernels.slstm.triton.step import slstm_step_triton

        sigmoid = forget_gate == "sigmoid"
        return slstm_step_triton(gate_preacts, recurrent_weight, bias, *state, sigmoid)
    with torch.autocast(gate_preacts.device.type, enabled=False):
        return _step(gate_preacts, recurrent_weight, bias, state, forget_gate)


def _step(gate_preacts, recurrent_weight, bias, state, forget_gate):
    h, c, n, m = state
    dtype = compute_dtype(gate_preacts.dtype)
    # [b, heads, 1, d] @ [heads, d, d] for each gate
    recurrent = h.to(dtype)[:, None, :, None] @ recurrent_weight.to(dtype)
    i, f, z, o = (gate_preacts.to(dtype) + recurrent.squeeze(-2) + bias.to(dtype)).unbind(1)
    m_old = m.to(dtype).masked_fill(n == 0, -torch.inf)
    carried = (logsigmoid(f) if forget_gate == "sigmoid" else f) + m_old
    m_new = torch.maximum(carried, i)
    decay, write = (carried - m_new).exp(), (i - m_new).exp()
    c.mul_(decay).add_(write * z.tanh())
    n.mul_(decay).add_(write)
    m.copy_(m_new)
    h.copy_(o.sigmoid() * c / n)
    return h.to(gate_preacts.dtype, copy=True)
