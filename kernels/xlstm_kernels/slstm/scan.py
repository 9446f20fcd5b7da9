"""sLSTM over a sequence: the public function in front of the backends."""

from collections.abc import Callable

from torch import Tensor

from xlstm_kernels.common.backends import select_backend
from xlstm_kernels.common.checks import check_boundaries
from xlstm_kernels.slstm.arguments import State, check_arguments


def _operator(backend: str) -> Callable:
    """The custom op behind `backend`; imported when it is used, since its library may be absent."""
    if backend == "torch":
        from xlstm_kernels.slstm.torch.scan import scan_forward
    elif backend == "numba":
        from xlstm_kernels.slstm.numba.scan import scan_forward
    else:
        from xlstm_kernels.slstm.triton.scan import scan_forward
    return scan_forward


def slstm_scan(
    gate_preacts: Tensor,
    recurrent_weight: Tensor,
    bias: Tensor,
    initial_state: State | None = None,
    *,
    return_last_state: bool = False,
    boundaries: Tensor | None = None,
    forget_gate: str = "sigmoid",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, State]:
    """SLSTM hidden states h [b, s, heads, d] in the dtype of gate_preacts, or (h, last state).

    gate_preacts [b, s, 4, heads, d] in the order i, f, z, o; recurrent_weight
    [4, heads, d_in, d_out] adds h_prev @ R_g to gate g; bias [4, heads, d]. Any float dtypes:
    everything is computed in float32 (float64 for float64 gate_preacts). `forget_gate` is
    "sigmoid" or "exp"; the input gate is exponential.

    The state (h, c, n, m), each [b, heads, d], carries h, exp(m) c and exp(m) n. A fresh state
    (None, a boundary, or n = 0) behaves as m = -inf, row by row; the returned m is finite.
    Gradients are exact, into and out of h, c and n; m carries none.

    `boundaries` is bool [b, s], True at the first token of a document: the state before it is
    forgotten. Raises ValueError for wrong shapes, dtypes, devices or options.
    """
    check_arguments(gate_preacts, recurrent_weight, bias, initial_state, forget_gate, time=True)
    check_boundaries(boundaries, *gate_preacts.shape[:2], gate_preacts)
    chosen = select_backend("slstm_scan", backend, gate_preacts, d=gate_preacts.shape[-1])
    state = initial_state if initial_state is not None else (None,) * 4
    sigmoid = forget_gate == "sigmoid"
    h, *rest = _operator(chosen)(gate_preacts, recurrent_weight, bias, *state, boundaries, sigmoid)
    return (h, tuple(rest[:4])) if return_last_state else h
