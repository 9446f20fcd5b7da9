"""The LSTM over a sequence and for one token, on the scans of the sLSTM.

It is the baseline of the xLSTM paper (arXiv 2405.04517, eq. 2-7), with the sLSTM's recurrence by
heads: `c = sigmoid(f) c + sigmoid(i) tanh(z)` and `h = sigmoid(o) tanh(c)`. Its state has no
normaliser and no stabiliser. The operators of the sLSTM carry n = 1 and m = 0 in their place.
"""

import torch
from torch import Tensor

from xlstm_kernels.common.backends import select_backend
from xlstm_kernels.common.checks import check_boundaries, check_no_tangents
from xlstm_kernels.slstm.arguments import State, check_arguments
from xlstm_kernels.slstm.scan import operator_of
from xlstm_kernels.slstm.step import gates_of_token

LstmState = tuple[Tensor, Tensor]
"""(h, c), each [b, heads, d]."""


def _as_slstm(state: LstmState | None) -> State | None:
    """The state as the sLSTM's functions know it: n = 1 says that there is one, m = 0."""
    if state is None:
        return None
    h, c = state
    return h, c, torch.ones_like(c), torch.zeros_like(c)


def lstm_scan(
    gate_preacts: Tensor,
    recurrent_weight: Tensor,
    bias: Tensor,
    initial_state: LstmState | None = None,
    *,
    return_last_state: bool = False,
    boundaries: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LstmState]:
    """Hidden states of the LSTM over a sequence.

    Everything is computed in float32, in float64 for float64 gate_preacts. Gradients are exact,
    into and out of h and c.

    Args:
        gate_preacts: Pre-activations [b, s, 4, heads, d] in the order i, f, z, o, of any float
            dtype.
        recurrent_weight: [4, heads, d_in, d_out], any float dtype: h_prev @ R_g is added to gate g.
        bias: [4, heads, d], any float dtype.
        initial_state: (h, c), each [b, heads, d]; None means zeros.
        return_last_state: Whether the state after the last token is returned as well.
        boundaries: bool [b, s], True at the first token of a document: the state before it is
            forgotten.
        backend: "torch" or "numba"; None for the best one.

    Returns:
        h [b, s, heads, d] in the dtype of gate_preacts; with `return_last_state` (h, (h, c)).

    Raises:
        ValueError: For wrong shapes, dtypes, devices or options.
        NotImplementedError: For forward-mode differentiation.
    """
    tensors, state = (gate_preacts, recurrent_weight, bias), _as_slstm(initial_state)
    check_arguments(*tensors, state, "sigmoid", "sigmoid", time=True)
    check_no_tangents("lstm_scan", *tensors, *(initial_state or ()))
    check_boundaries(boundaries, *gate_preacts.shape[:2], gate_preacts)
    facts = {"d": gate_preacts.shape[-1], "cell": "lstm"}
    chosen = select_backend("slstm_scan", backend, gate_preacts, **facts)
    parts = state if state is not None else (None,) * 4
    h, *rest = operator_of(chosen)(*tensors, *parts, boundaries, True, "lstm")
    return (h, (rest[0], rest[1])) if return_last_state else h


@torch.no_grad()
def lstm_step(
    gate_preacts: Tensor, recurrent_weight: Tensor, bias: Tensor, state: LstmState
) -> Tensor:
    """Hidden state of one token; the state is updated in place. No gradient is recorded.

    Args:
        gate_preacts: Pre-activations of i, f, z, o, [b, 4, heads, d].
        recurrent_weight: [4, heads, d_in, d_out].
        bias: [4, heads, d].
        state: (h, c), each [b, heads, d]; changed in place. Zeros are a fresh state.

    Returns:
        h [b, heads, d] in the dtype of gate_preacts.

    Raises:
        ValueError: For wrong shapes, dtypes or devices.
        NotImplementedError: For forward-mode differentiation.
    """
    tensors = gate_preacts, recurrent_weight, bias
    check_arguments(*tensors, _as_slstm(state), "sigmoid", "sigmoid", time=False)
    check_no_tangents("lstm_step", *tensors, *state)
    h, c = state
    with torch.autocast(gate_preacts.device.type, enabled=False):
        i, f, z, o = gates_of_token(*tensors, h)
        c.mul_(f.sigmoid()).add_(i.sigmoid() * z.tanh())
        h.copy_(o.sigmoid() * c.tanh())
    return h.to(gate_preacts.dtype, copy=True)
