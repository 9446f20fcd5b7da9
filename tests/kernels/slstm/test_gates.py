"""The LSTM and the sLSTM with a sigmoid input gate against their float64 step recurrences."""

import pytest
import torch

from tests.kernels.comparison import assert_float32_close, relative_error
from tests.kernels.slstm.test_scan import make_inputs, split
from tests.kernels.slstm.test_scan import recurrence as slstm_outputs
from tests.kernels.slstm.test_scan import scan as slstm_scan_outputs
from xlstm_kernels import lstm_scan, lstm_step, slstm_scan, slstm_step
from xlstm_kernels.slstm.reference import lstm_recurrence, slstm_recurrence

BACKENDS = ["torch", "numba"]


def without_scale(inputs):
    """The LSTM's state is h and c."""
    return {name: x for name, x in inputs.items() if name not in ("n0", "m0")}


def arguments_of(x):
    state = (x["h0"], x["c0"]) if "h0" in x else None
    return x["x"], x["R"], x["b"], state


def reference(x, backend=None, **options):
    h, (h_last, c) = lstm_recurrence(*arguments_of(x), **options)
    return {"h": h, "h_last": h_last, "c": c}


def lstm(x, **options):
    h, (h_last, c) = lstm_scan(*arguments_of(x), return_last_state=True, **options)
    return {"h": h, "h_last": h_last, "c": c}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("gates", ["usual", "random +-15"])
@pytest.mark.parametrize("s", [1, 34])
def test_lstm_values_states_and_gradients(s, gates, state, backend):
    if backend == "numba":
        pytest.importorskip("numba", reason="the extra cpu (numba) is not installed")
    torch.manual_seed(5)
    boundaries = torch.rand(3, s) < 0.2 if state else None
    inputs = without_scale(make_inputs(s, gates, state))
    assert_float32_close(lstm, reference, inputs, boundaries=boundaries, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("gates", ["usual", "igate -10, fgate +6", "random +-15"])
def test_sigmoid_input_gate_values_states_and_gradients(gates, state, forget_gate, backend):
    if backend == "numba":
        pytest.importorskip("numba", reason="the extra cpu (numba) is not installed")
    torch.manual_seed(5)
    options = {"forget_gate": forget_gate, "input_gate": "sigmoid", "backend": backend}
    boundaries = torch.rand(3, 34) < 0.2 if state else None
    inputs = make_inputs(34, gates, state)
    assert_float32_close(
        slstm_scan_outputs, slstm_outputs, inputs, boundaries=boundaries, **options
    )


def test_steps_are_the_sequence():
    inputs = make_inputs(12)
    gates, R, b = (inputs[name].double() for name in ("x", "R", "b"))
    state = tuple(torch.zeros(3, 2, 8, dtype=torch.float64) for _ in range(2))
    expected, last = lstm_recurrence(gates, R, b)
    for t in range(12):
        assert relative_error(lstm_step(gates[:, t], R, b, state), expected[:, t]) < 1e-12
    for got, part in zip(state, last, strict=True):
        assert relative_error(got, part) < 1e-12

    expected, last = slstm_recurrence(gates, R, b, input_gate="sigmoid")
    state = tuple(torch.zeros(3, 2, 8, dtype=torch.float64) for _ in range(4))
    for t in range(12):
        h = slstm_step(gates[:, t], R, b, state, input_gate="sigmoid")
        assert relative_error(h, expected[:, t]) < 1e-12


def test_lstm_is_torchs_lstm():
    """One head of `lstm_scan` is `torch.nn.LSTM`, whose gates are in the order i, f, z, o too."""
    d = 8
    module = torch.nn.LSTM(5, d, batch_first=True).double()
    x = torch.randn(3, 9, 5, dtype=torch.float64)
    expected, (h, c) = module(x)
    preacts = (x @ module.weight_ih_l0.T).view(3, 9, 4, 1, d)
    recurrent = module.weight_hh_l0.view(4, 1, d, d).mT
    bias = (module.bias_ih_l0 + module.bias_hh_l0).view(4, 1, d)
    got, (h_last, c_last) = lstm_scan(preacts, recurrent, bias, return_last_state=True)
    torch.testing.assert_close(got[:, :, 0], expected)
    torch.testing.assert_close(h_last[:, 0], h[0])
    torch.testing.assert_close(c_last[:, 0], c[0])


@pytest.mark.parametrize("cell", ["slstm_sigmoid", "lstm"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_keep_their_promises(cell, backend):
    """What `torch.library.opcheck` looks for: fake shapes, strides, registered gradients."""
    if backend == "numba":
        pytest.importorskip("numba", reason="the extra cpu (numba) is not installed")
    from xlstm_kernels.slstm.scan import operator_of

    inputs = make_inputs(5, state=True)
    arguments, state = split(inputs)
    arguments = [x.requires_grad_() for x in arguments]
    operator = operator_of(backend)
    torch.library.opcheck(operator, (*arguments, *state, None, True, cell))


def test_a_backend_without_the_gate_says_so():
    x = make_inputs(3)
    with pytest.raises(ValueError, match="input_gate='linear'"):
        slstm_scan(x["x"], x["R"], x["b"], input_gate="linear")
    from xlstm_kernels.slstm.triton import scan as triton_scan

    reason = triton_scan.unsupported_reason(x["x"], d=8, asked=True, cell="lstm")
    assert reason is not None
