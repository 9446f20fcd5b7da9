"""The edges of the cells' contract: gates that are shut, and derivatives that do not exist.

The Triton kernels: tests/kernels/triton/test_mlstm.py, test_slstm.py.
"""

import pytest
import torch
from torch.autograd import forward_ad

from xlstm_kernels import (
    causal_conv1d,
    mlstm_chunkwise,
    mlstm_step,
    slstm_scan,
    slstm_step,
)
from xlstm_kernels.mlstm.reference import mlstm_recurrence
from xlstm_kernels.slstm.reference import slstm_recurrence

B, HEADS, S, D = 2, 2, 24, 4
SHUT = [-torch.inf, -1e30, -1e13, -1e6]
EMPTY_STATE = tuple(
    torch.zeros(B, HEADS, *shape, dtype=torch.float64) for shape in [(D, D), (D,), ()]
)


def mlstm_inputs(shut):
    """Some forget gates are shut, in the middle of a chunk, at its end and two in a row."""
    rng = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(B, HEADS, S, D, generator=rng, dtype=torch.float64) for _ in "qkv")
    i, f = (torch.randn(B, HEADS, S, generator=rng, dtype=torch.float64) for _ in "if")
    f[0, :, [3, 7, 8, 16]] = shut
    f[1, 0, 0] = shut
    return q, k, v, i, f + 0.0


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("shut", SHUT)
def test_a_shut_forget_gate_forgets_and_nothing_else_is_touched(shut, gate):
    inputs = [x.requires_grad_() for x in mlstm_inputs(shut)]
    h, last = mlstm_chunkwise(*inputs, chunk_size=8, gate=gate, return_last_state=True)
    wanted = [x.clamp(min=-1e6).detach().requires_grad_() for x in mlstm_inputs(shut)]
    expected, expected_last = mlstm_recurrence(*wanted, gate=gate)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(h, expected, **close)
    torch.testing.assert_close(last, expected_last, **close)
    unclamped, _ = mlstm_recurrence(*mlstm_inputs(shut), gate=gate)
    torch.testing.assert_close(h, unclamped, **close)
    h.sum().backward()
    expected.sum().backward()
    for got, leaf in zip(inputs, wanted, strict=True):
        torch.testing.assert_close(got.grad, leaf.grad, **close)


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("shut", SHUT)
def test_a_step_with_a_shut_forget_gate_equals_the_chunks(shut, gate):
    inputs = mlstm_inputs(shut)
    expected = mlstm_chunkwise(*inputs, gate=gate)
    state = tuple(part.clone() for part in EMPTY_STATE)
    steps = [mlstm_step(*(x[:, :, t] for x in inputs), state, gate=gate) for t in range(S)]
    torch.testing.assert_close(torch.stack(steps, 2), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
@pytest.mark.parametrize("shut", SHUT)
def test_the_slstm_with_a_shut_forget_gate(shut, forget_gate, backend):
    dtype = torch.float32 if backend == "numba" else torch.float64
    rng = torch.Generator().manual_seed(3)
    gates = torch.randn(B, S, 4, HEADS, D, generator=rng, dtype=dtype)
    gates[0, [3, 4, 9], 1] = shut
    weight = torch.randn(4, HEADS, D, D, generator=rng, dtype=dtype) / 4
    bias = torch.randn(4, HEADS, D, generator=rng, dtype=dtype)
    h = slstm_scan(gates, weight, bias, forget_gate=forget_gate, backend=backend)
    wide = (x.double() for x in (gates, weight, bias))
    expected, _ = slstm_recurrence(*wide, forget_gate=forget_gate)
    torch.testing.assert_close(h.double(), expected, rtol=1e-5, atol=1e-5)
    state = tuple(torch.zeros(B, HEADS, D, dtype=dtype) for _ in "hcnm")
    steps = [
        slstm_step(gates[:, t], weight, bias, state, forget_gate=forget_gate) for t in range(S)
    ]
    torch.testing.assert_close(torch.stack(steps, 1).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_gate_that_is_nan_is_not_hidden():
    q, k, v, i, f = mlstm_inputs(-1e13)
    f[1, 1, 5] = torch.nan
    assert mlstm_chunkwise(q, k, v, i, f)[1, 1, 5:].isnan().all()


def test_forward_mode_raises_instead_of_returning_zero():
    q, k, v, i, f = mlstm_inputs(0.0)
    gates, bias = torch.randn(B, S, 4, HEADS, D), torch.randn(4, HEADS, D)
    calls = {
        "mlstm_chunkwise": lambda x: mlstm_chunkwise(x, k, v, i, f),
        "slstm_scan": lambda x: slstm_scan(x, torch.randn(4, HEADS, D, D), bias),
        "causal_conv1d": lambda x: causal_conv1d(x, torch.randn(D, 4)),
    }
    inputs = {"mlstm_chunkwise": q, "slstm_scan": gates, "causal_conv1d": torch.randn(B, S, D)}
    for name, call in calls.items():
        x = inputs[name]
        with pytest.raises(NotImplementedError, match=name), forward_ad.dual_level():
            call(forward_ad.make_dual(x, torch.ones_like(x)))
        with pytest.raises(NotImplementedError, match=name):
            torch.func.jvp(call, (x,), (torch.ones_like(x),))
