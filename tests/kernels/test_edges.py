"""The edges of the cells' contract: gates that are shut, and gates that are no numbers.

The Triton kernels: tests/kernels/triton/test_mlstm.py, test_slstm.py.
"""

import pytest
import torch

from xlstm_kernels import mlstm_chunkwise, mlstm_step, slstm_scan, slstm_step
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
    inputs[3][0, :, 8] = -torch.inf  # nothing is kept there, and nothing written
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


# What no cell can go on from, as (kind, gate, value); an infinite sigmoid is an open gate.
MLSTM_BROKEN = [("exp", "i", torch.nan), ("exp", "i", torch.inf), ("exp", "f", torch.nan)]
MLSTM_BROKEN += [("sigmoid", "i", torch.nan), ("sigmoid", "f", torch.nan)]
SLSTM_BROKEN = [(kind, *case) for kind in ("sigmoid", "exp") for _, *case in MLSTM_BROKEN[:3]]
SLSTM_BROKEN += [("exp", "f", torch.inf)]


def assert_no_number(*tensors):
    """No element of any tensor is a number."""
    assert all(x.isnan().all() for x in tensors), [int(x.isnan().sum()) for x in tensors]


def check_broken_mlstm(gate, name, value, backend):
    """NaN from the broken gate on, in states and gradients, and nothing in the other head.

    It breaks in the second of three chunks. There a document starts: with a broken input gate at
    its token, otherwise before it, because the forget gate of a first token decays nothing.
    """
    rng = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 1, 2, 40, 16, generator=rng)
    i, f = torch.randn(2, 1, 2, 40, generator=rng)
    {"i": i, "f": f}[name][0, 0, 20] = value
    starts = torch.zeros(1, 40, dtype=torch.bool)
    starts[0, 20 if name == "i" else 19] = True
    leaves = [x.requires_grad_() for x in (q, k, v, i, f)]
    options = {"chunk_size": 16, "gate": gate, "return_last_state": True, "backend": backend}
    h, (C, n, m) = mlstm_chunkwise(*leaves, boundaries=starts, **options)
    assert_no_number(h[0, 0, 20:], C[0, 0], n[0, 0])
    assert gate == "sigmoid" or not m[0, 0].isfinite()
    assert h[0, 1].isfinite().all()
    h.sum().backward()
    for x in leaves:
        assert not x.grad[0, 0].isfinite().all() and x.grad[0, 1].isfinite().all()
    state = tuple(torch.zeros(1, 2, *shape) for shape in [(16, 16), (16,), ()])
    one = (x.detach()[:, :, 20] for x in leaves)
    h = mlstm_step(*one, state, gate=gate, backend=backend)
    assert_no_number(h[0, 0], state[0][0, 0], state[1][0, 0])
    assert h[0, 1].isfinite().all()


@pytest.mark.parametrize(("gate", "name", "value"), MLSTM_BROKEN)
def test_a_broken_gate_of_the_mlstm_is_not_hidden(gate, name, value):
    check_broken_mlstm(gate, name, value, "torch")


def check_broken_slstm(forget_gate, name, value, backend):
    """NaN from the broken gate of the second step on, and in every gradient."""
    rng = torch.Generator().manual_seed(3)
    gates = torch.randn(2, 4, 4, 1, 16, generator=rng)
    gates[0, 1, "if".index(name), 0, 5] = value
    weight = torch.randn(4, 1, 16, 16, generator=rng) / 4
    bias = torch.randn(4, 1, 16, generator=rng)
    leaves = [x.requires_grad_() for x in (gates, weight, bias)]
    options = {"forget_gate": forget_gate, "backend": backend}
    h, last = slstm_scan(*leaves, return_last_state=True, **options)
    assert h[0, 0].isfinite().all() and h[1].isfinite().all()
    assert_no_number(h[0, 1:, 0, 5], h[0, 2:], *(x[0, 0, 5] for x in last[:3]))
    h.sum().backward()
    assert_no_number(gates.grad[0, 1, :2, 0, 5], bias.grad[:2, 0, 5])
    assert not weight.grad.isfinite().all() and gates.grad[1].isfinite().all()
    if backend in ("torch", "triton"):
        state = tuple(torch.zeros(2, 1, 16) for _ in "hcnm")
        for t in (0, 1):
            slstm_step(gates.detach()[:, t], *leaves[1:], state, **options)
        assert_no_number(*(x[0, 0, 5] for x in state[:3]))
        assert all(x[1].isfinite().all() for x in state)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize(("forget_gate", "name", "value"), SLSTM_BROKEN)
def test_a_broken_gate_of_the_slstm_is_not_hidden(forget_gate, name, value, backend):
    check_broken_slstm(forget_gate, name, value, backend)
