"""sLSTM over a sequence: the public function in front of the backends."""

from collections.abc import Callable

from torch import Tensor

from xlstm_kernels.common.backends import select_backend
from xlstm_kernels.common.checks import check_boundaries, check_no_tangents
from xlstm_kernels.slstm.arguments import State, cell_of, check_arguments


def operator_of(backend: str) -> Callable:
    """The custom op behind `backend`; imported when it is used, since its library may be absent."""
    if backend == "torch":
        from xlstm_kernels.slstm.torch.scan import scan_forward
    elif backend == "numba":
        from xlstm_kernels.slstm.numba.scan import scan_forward
    elif backend == "persistent":
        from xlstm_kernels.slstm.triton.persistent_scan import scan_forward
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
    input_gate: str = "exp",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, State]:
    """Hidden states of the sLSTM over a sequence.

    Everything is computed in float32, in float64 for float64 gate_preacts. Gradients are exact,
    into and out of h, c and n; m carries none.

    Args:
        gate_preacts: Pre-activations [b, s, 4, heads, d] in the order i, f, z, o, of any float
            dtype.
        recurrent_weight: [4, heads, d_in, d_out], any float dtype: h_prev @ R_g is added to gate g.
        bias: [4, heads, d], any float dtype.
        initial_state: (h, c, n, m), each [b, heads, d], which stands for h, exp(m) c and exp(m) n.
            A fresh state (None, a boundary, or n = 0) behaves as m = -inf, row by row.
        return_last_state: Whether the state after the last token is returned as well; its m is
            finite.
        boundaries: bool [b, s], True at the first token of a document: the state before it is
            forgotten.
        forget_gate: "sigmoid" or "exp".
        input_gate: "exp", as in the paper, or "sigmoid".
        backend: "torch", "triton", "numba" or "persistent"; None for the best one. "persistent" is
            the persistent form on Triton, which is never chosen unasked.

    Returns:
        h [b, s, heads, d] in the dtype of gate_preacts; with `return_last_state` (h, (h, c, n, m)).

    Raises:
        ValueError: For wrong shapes, dtypes, devices or options.
        NotImplementedError: For forward-mode differentiation.
    """
    tensors = gate_preacts, recurrent_weight, bias
    check_no_tangents("slstm_scan", *tensors, *(initial_state or ()))
    check_arguments(*tensors, initial_state, forget_gate, input_gate, time=True)
    check_boundaries(boundaries, *gate_preacts.shape[:2], gate_preacts)
    cell, (batch, _, _, heads, d) = cell_of(input_gate), gate_preacts.shape
    facts = {"d": d, "cell": cell, "batch": batch, "heads": heads}
    chosen = select_backend("slstm_scan", backend, gate_preacts, **facts)
    state = initial_state if initial_state is not None else (None,) * 4
    sigmoid = forget_gate == "sigmoid"
    h, *rest = operator_of(chosen)(*tensors, *state, boundaries, sigmoid, cell)
    return (h, tuple(rest[:4])) if return_last_state else h
