"""The sLSTM for one token, as generation uses it."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from xlstm_kernels.common.backends import select_backend
from xlstm_kernels.common.checks import check_no_tangents, compute_dtype
from xlstm_kernels.slstm.arguments import State, cell_of, check_arguments


@torch.no_grad()
def slstm_step(
    gate_preacts: Tensor,
    recurrent_weight: Tensor,
    bias: Tensor,
    state: State,
    *,
    forget_gate: str = "sigmoid",
    input_gate: str = "exp",
    backend: str | None = None,
) -> Tensor:
    """Hidden state of one token; the state is updated in place.

    The equations and options are those of `slstm_scan`. No gradient is recorded.

    Args:
        gate_preacts: Pre-activations of i, f, z, o, [b, 4, heads, d].
        recurrent_weight: [4, heads, d_in, d_out].
        bias: [4, heads, d].
        state: (h, c, n, m), each [b, heads, d]; changed in place. Zeros are a fresh state.
        forget_gate: "sigmoid" or "exp".
        input_gate: "exp" or "sigmoid".
        backend: "torch" or "triton"; None for the best one.

    Returns:
        h [b, heads, d] in the dtype of gate_preacts.

    Raises:
        ValueError: For wrong shapes, dtypes, devices or options, and for a missing state.
        NotImplementedError: For forward-mode differentiation.
    """
    if state is None:
        raise ValueError("state=None cannot be updated in place; pass zeros for an empty state")
    tensors = gate_preacts, recurrent_weight, bias
    check_arguments(*tensors, state, forget_gate, input_gate, time=False)
    check_no_tangents("slstm_step", *tensors, *state)
    facts = {"d": gate_preacts.shape[-1], "cell": cell_of(input_gate)}
    if select_backend("slstm_step", backend, gate_preacts, **facts) == "triton":
        from xlstm_kernels.slstm.triton.step import slstm_step_triton

        sigmoid = forget_gate == "sigmoid"
        return slstm_step_triton(*tensors, *state, sigmoid)
    with torch.autocast(gate_preacts.device.type, enabled=False):
        return _step(*tensors, state, forget_gate, input_gate)


def gates_of_token(
    gate_preacts: Tensor, recurrent_weight: Tensor, bias: Tensor, h: Tensor
) -> tuple[Tensor, ...]:
    """Pre-activations of i, f, z, o with the recurrent part and the bias, [b, heads, d] each."""
    dtype = compute_dtype(gate_preacts.dtype)
    # [b, heads, 1, d] @ [heads, d, d] for each gate
    recurrent = h.to(dtype)[:, None, :, None] @ recurrent_weight.to(dtype)
    return (gate_preacts.to(dtype) + recurrent.squeeze(-2) + bias.to(dtype)).unbind(1)


def _step(gate_preacts, recurrent_weight, bias, state, forget_gate, input_gate):
    h, c, n, m = state
    i, f, z, o = gates_of_token(gate_preacts, recurrent_weight, bias, h)
    i = i if input_gate == "exp" else logsigmoid(i)
    m_old = m.to(i.dtype).masked_fill(n == 0, -torch.inf)
    carried = (logsigmoid(f) if forget_gate == "sigmoid" else f) + m_old
    m_new = torch.maximum(carried, i)
    decay, write = (carried - m_new).exp(), (i - m_new).exp()
    c.mul_(decay).add_(write * z.tanh())
    n.mul_(decay).add_(write)
    m.copy_(m_new)
    h.copy_(o.sigmoid() * c / n)
    return h.to(gate_preacts.dtype, copy=True)
