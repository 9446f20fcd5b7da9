"""The sLSTM kernels against the float64 step recurrence."""

import pytest
import torch

from tests.kernels.comparison import assert_float32_close, assert_same, relative_error, run
from xlstm_kernels import slstm_scan, slstm_step
from xlstm_kernels.slstm.reference import slstm_recurrence

B, HEADS, D = 3, 2, 8
GATES = {  # (igate, fgate) added to the random pre-activations, and their spread
    "usual": (0.0, 3.0, 1.0),
    "igate -10, fgate +6": (-10.0, 6.0, 0.5),
    "fgate -15": (0.0, -15.0, 1.0),
    "random +-15": (0.0, 0.0, 15.0),
}


def make_inputs(s, gates="usual", state=False, seed=0):
    torch.manual_seed(seed)
    igate, fgate, spread = GATES[gates]
    x = torch.randn(B, s, 4, HEADS, D)
    if spread == 15.0:
        x[:, :, :2] = x[:, :, :2].sign()
    x[:, :, :2] *= spread
    x[:, :, 0] += igate
    x[:, :, 1] += fgate
    inputs = {"x": x, "R": torch.randn(4, HEADS, D, D) * 0.2, "b": torch.randn(4, HEADS, D) * 0.3}
    if state:
        for name in ("h0", "c0", "m0"):
            inputs[name] = torch.randn(B, HEADS, D)
        inputs["n0"] = torch.rand(B, HEADS, D) + 0.5
    return inputs


def split(x):
    state = tuple(x[name] for name in ("h0", "c0", "n0", "m0")) if "h0" in x else None
    return (x["x"], x["R"], x["b"]), state


def outputs(h, state):
    return {"h": h} | dict(zip(("h_last", "c", "n", "m"), state, strict=True))


def recurrence(x, backend=None, **options):
    arguments, state = split(x)
    return outputs(*slstm_recurrence(*arguments, state, **options))


def scan(x, **options):
    arguments, state = split(x)
    return outputs(*slstm_scan(*arguments, state, return_last_state=True, **options))


@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("s", [1, 2, 65])
def test_float32_values_states_and_gradients(s, gates, state, forget_gate):
    torch.manual_seed(5)
    boundaries = torch.rand(B, s) < 0.1 if state else None
    inputs = make_inputs(s, gates, state)
    assert_float32_close(scan, recurrence, inputs, boundaries=boundaries, forget_gate=forget_gate)


@pytest.mark.parametrize("s", [63, 64, 1000])
def test_float32_at_more_lengths(s):
    torch.manual_seed(5)
    boundaries = torch.rand(B, s) < 0.01
    assert_float32_close(scan, recurrence, make_inputs(s, state=True), boundaries=boundaries)


def test_every_token_its_own_document():
    boundaries = torch.ones(B, 9, dtype=torch.bool)
    inputs = make_inputs(9, "random +-15", state=True)
    for backend in ("torch", None):
        assert_float32_close(scan, recurrence, inputs, boundaries=boundaries, backend=backend)


@pytest.mark.parametrize("state", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("position", range(6))
def test_boundary_is_a_new_sequence_for_its_row_only(position, state):
    s = 6
    boundaries = torch.zeros(B, s, dtype=torch.bool)
    boundaries[1, position] = True

    def apart(x, **_):
        (gates, R, b), start = split(x)
        h, last = slstm_recurrence(gates, R, b, start)
        row = gates[1:2]
        parts = []
        if position > 0:
            start = None if start is None else tuple(part[1:2] for part in start)
            parts.append(slstm_recurrence(row[:, :position], R, b, start)[0])
        tail, row_last = slstm_recurrence(row[:, position:], R, b)
        h = torch.cat([h[:1], torch.cat([*parts, tail], 1), h[2:]])
        last = (torch.cat([a[:1], z, a[2:]]) for a, z in zip(last, row_last, strict=True))
        return outputs(h, last)

    inputs = make_inputs(s, state=state)
    expected = run(apart, inputs, torch.float64)
    got = run(scan, inputs, torch.float64, boundaries=boundaries)
    assert_same(got, expected)
    if state and position == 0:
        for name in ("d_h0", "d_c0", "d_n0"):
            assert not got[name][1].any() and got[name][0].any()


@pytest.mark.parametrize("cut", [1, 8])
def test_two_segments_with_carried_state_are_one_sequence(cut):
    def in_two(x, **_):
        (gates, R, b), state = split(x)
        h1, state = slstm_scan(gates[:, :cut], R, b, state, return_last_state=True)
        h2, state = slstm_scan(gates[:, cut:], R, b, state, return_last_state=True)
        return outputs(torch.cat([h1, h2], 1), state)

    inputs = make_inputs(17, state=True)
    expected = run(recurrence, inputs, torch.float64)
    assert_same(run(in_two, inputs, torch.float64), expected)


def test_zeros_are_a_fresh_state_and_the_returned_m_is_finite():
    inputs = make_inputs(7)
    zeros = {name: torch.zeros(B, HEADS, D) for name in ("h0", "c0", "n0", "m0")}
    # igate -200: with m = 0 instead of -inf the first step would be 0 / 0
    inputs["x"][:, :, 0] -= 200
    fresh, zero = scan(inputs), scan(inputs | zeros)
    for name, x in fresh.items():
        assert x.isfinite().all() and torch.equal(x, zero[name]), name


@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
@pytest.mark.parametrize("function", [slstm_scan, slstm_recurrence])
def test_finite_differences(function, forget_gate):
    torch.manual_seed(2)
    b, s, heads, d = 2, 4, 2, 2
    inputs = [torch.randn(b, s, 4, heads, d), torch.randn(4, heads, d, d), torch.randn(4, heads, d)]
    inputs += [torch.randn(b, heads, d), torch.randn(b, heads, d), torch.rand(b, heads, d) + 0.5]
    inputs = [x.double().requires_grad_() for x in inputs]
    boundaries = torch.tensor([[False] * 4, [False, False, True, False]])
    options = {"return_last_state": True} if function is slstm_scan else {}

    def outside(x, R, bias, h, c, n):
        m = torch.zeros_like(h)
        h, (h_last, c, n, m) = function(
            x, R, bias, (h, c, n, m), boundaries=boundaries, forget_gate=forget_gate, **options
        )
        return h, h_last, m.exp() * c, m.exp() * n

    assert torch.autograd.gradcheck(outside, inputs)


def test_bfloat16_inputs_lose_only_the_rounding_of_the_outputs():
    inputs = {name: x.bfloat16() for name, x in make_inputs(33, state=True).items()}
    exact = run(recurrence, inputs, torch.float64)
    got = run(scan, inputs, torch.bfloat16)
    assert got["h"].dtype == torch.bfloat16 and got["c"].dtype == torch.float32
    for name, reference in exact.items():
        assert relative_error(got[name], reference) < 1e-2, name


@pytest.mark.parametrize("size", [120.0, 1e4, 1e30])
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_finite_input_never_gives_nan(size, forget_gate):
    inputs = make_inputs(10, state=True)
    inputs["x"] *= size
    for name, x in run(scan, inputs, torch.float32, forget_gate=forget_gate).items():
        assert x.isfinite().all(), name


@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_steps_are_the_sequence(forget_gate):
    inputs = make_inputs(12)
    expected = run(recurrence, inputs, torch.float64, forget_gate=forget_gate)
    gates, R, b = (inputs[name].double() for name in ("x", "R", "b"))
    state = tuple(torch.zeros(B, HEADS, D, dtype=torch.float64) for _ in range(4))
    for t in range(12):
        h = slstm_step(gates[:, t], R, b, state, forget_gate=forget_gate)
        assert relative_error(h, expected["h"][:, t]) < 1e-12
    for got, name in zip(state, ("h_last", "c", "n", "m"), strict=True):
        assert relative_error(got, expected[name]) < 1e-12
