"""The Triton sLSTM in the interpreter against the float64 step recurrence."""

import pytest
import torch

from tests.kernels.comparison import assert_float32_close, relative_error, run
from tests.kernels.slstm.test_numba import GATES, make_inputs, recurrence
from tests.kernels.slstm.test_scan import outputs, split
from xlstm_kernels import slstm_scan, slstm_step
from xlstm_kernels.slstm.triton import scan as scan_triton
from xlstm_kernels.slstm.triton import step as step_triton

torch.set_num_threads(1)

# batch, heads, d, steps: resident, streamed by one program, and a launch for each step.
RESIDENT, STREAMED, APART = (3, 2, 20), (2, 2, 144), (2, 1, 264)
FORMS = {"resident": RESIDENT, "streamed": STREAMED, "apart": APART}
SHAPES = [((1, 1, 16), 1), ((3, 4, 20), 2), ((1, 1, 16), 63), ((17, 1, 32), 3), ((1, 4, 48), 3)]
SHAPES += [((1, 1, 192), 2), ((17, 1, 144), 2), ((1, 1, 264), 2)]


def scan(x, **options):
    arguments, state = split(x)
    result = slstm_scan(*arguments, state, return_last_state=True, backend="triton", **options)
    return outputs(*result)


def tiles(d, dtype):
    return scan_triton.tiles_for("interpreter", d, dtype)


def test_the_shapes_reach_every_form():
    assert tiles(RESIDENT[2], torch.float32).inner == 0
    assert tiles(STREAMED[2], torch.float32).inner > 0
    assert not tiles(STREAMED[2], torch.float32).apart
    assert tiles(APART[2], torch.float32).apart


@pytest.mark.parametrize(("shape", "s"), SHAPES, ids=str)
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "carried"])
def test_values_states_and_gradients(shape, s, state):
    assert_float32_close(scan, recurrence, make_inputs(shape, s, state=state))


@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
@pytest.mark.parametrize("gates", GATES)
def test_gates_at_their_extremes(gates, forget_gate):
    inputs = make_inputs(RESIDENT, 9, gates, state=True)
    assert_float32_close(scan, recurrence, inputs, forget_gate=forget_gate)


@pytest.mark.parametrize("shape", [STREAMED, APART], ids=["streamed", "apart"])
def test_exponential_forget_gate_of_the_other_forms(shape):
    assert_float32_close(scan, recurrence, make_inputs(shape, 3), forget_gate="exp")


@pytest.mark.parametrize(
    "shape", [RESIDENT, STREAMED, APART], ids=["resident", "streamed", "apart"]
)
@pytest.mark.parametrize("position", range(3))
def test_boundary_at_every_position(position, shape):
    boundaries = torch.zeros(shape[0], 3, dtype=torch.bool)
    boundaries[1, position] = True
    inputs = make_inputs(shape, 3, state=True)
    assert_float32_close(scan, recurrence, inputs, boundaries=boundaries)
    if position == 0:
        got = run(scan, inputs, torch.float32, boundaries=boundaries)
        for name in ("d_h0", "d_c0", "d_n0"):
            assert not got[name][1].any() and got[name][0].any()


def test_every_token_its_own_document():
    boundaries = torch.ones(3, 4, dtype=torch.bool)
    inputs = make_inputs(RESIDENT, 4, state=True)
    assert_float32_close(scan, recurrence, inputs, boundaries=boundaries)


@pytest.mark.parametrize("shape", [RESIDENT, STREAMED], ids=["resident", "streamed"])
@pytest.mark.parametrize("cut", [1, 2])
def test_two_segments_with_carried_state_are_one_sequence(shape, cut):
    def in_two(x, **_):
        (gates, R, b), state = split(x)
        options = {"return_last_state": True, "backend": "triton"}
        h1, state = slstm_scan(gates[:, :cut], R, b, state, **options)
        h2, state = slstm_scan(gates[:, cut:], R, b, state, **options)
        return outputs(torch.cat([h1, h2], 1), state)

    assert_float32_close(in_two, recurrence, make_inputs(shape, 5, state=True))


@pytest.mark.parametrize(
    "shape", [RESIDENT, STREAMED, APART], ids=["resident", "streamed", "apart"]
)
def test_bfloat16(shape):
    inputs = {name: x.bfloat16() for name, x in make_inputs(shape, 4, state=True).items()}
    boundaries = torch.zeros(shape[0], 4, dtype=torch.bool)
    boundaries[0, 2] = True
    exact = run(recurrence, inputs, torch.float64, boundaries=boundaries)
    got = run(scan, inputs, torch.bfloat16, boundaries=boundaries)
    assert got["h"].dtype == torch.bfloat16 and got["c"].dtype == torch.float32
    for name, reference in exact.items():
        assert relative_error(got[name], reference) < 1e-2, name


def test_bfloat16_over_many_steps():
    inputs = {name: x.bfloat16() for name, x in make_inputs((2, 1, 16), 100, "usual").items()}
    exact = run(recurrence, inputs, torch.float64)
    got = run(scan, inputs, torch.bfloat16)
    for name, reference in exact.items():
        assert relative_error(got[name], reference) < 1e-2, name


@pytest.mark.parametrize("size", [120.0, 1e30])
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_finite_input_never_gives_nan(size, forget_gate):
    inputs = make_inputs(RESIDENT, 5, state=True)
    inputs["x"] *= size
    for name, x in run(scan, inputs, torch.float32, forget_gate=forget_gate).items():
        assert x.isfinite().all(), name


def test_strided_inputs_and_autocast_change_nothing():
    inputs = make_inputs(RESIDENT, 3, state=True)
    expected = run(scan, inputs, torch.float32)
    for name in ("x", "R"):
        inputs[name] = inputs[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(scan, inputs, torch.float32)
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-5)


def test_custom_op_follows_the_rules_of_torch():
    x, R, b = (x.requires_grad_() for x in make_inputs(RESIDENT, 2).values())
    state = [torch.rand(3, 2, 20, requires_grad=True) for _ in range(3)] + [torch.zeros(3, 2, 20)]
    boundaries = torch.zeros(3, 2, dtype=torch.bool)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    op = scan_triton.scan_forward
    torch.library.opcheck(op, (x, R, b, *state, boundaries, True, "slstm"), test_utils=tests)
    half = (x.bfloat16(), R, b, *[None] * 5, False, "slstm")
    torch.library.opcheck(op, half, test_utils=tests)


@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
@pytest.mark.parametrize("shape", [RESIDENT, (17, 1, 48), APART], ids=str)
def test_steps_are_the_sequence(shape, forget_gate):
    """From a fresh state, with rows of their own and of a second block; the state in place."""
    inputs = make_inputs(shape, 3)
    exact = recurrence({name: x.double() for name, x in inputs.items()}, forget_gate=forget_gate)
    plain = recurrence(inputs, forget_gate=forget_gate)
    batch, heads, d = shape
    state = tuple(torch.zeros(batch, heads, d) for _ in range(4))
    state = (state[0].mT.contiguous().mT, *state[1:])  # one part is not contiguous
    for t in range(3):
        one = inputs["x"][:, t], inputs["R"], inputs["b"]
        h = slstm_step(*one, state, forget_gate=forget_gate, backend="triton")
        limit = max(5e-6, 8 * relative_error(plain["h"][:, t], exact["h"][:, t]))
        assert relative_error(h, exact["h"][:, t]) <= limit
        assert torch.equal(h, state[0])
    for got, name in zip(state, ("h_last", "c", "n", "m"), strict=True):
        limit = max(5e-6, 8 * relative_error(plain[name], exact[name]))
        assert relative_error(got, exact[name]) <= limit, name


def test_a_step_in_bfloat16_with_float32_weights():
    (x, R, b), state = split(make_inputs(APART, 1, state=True))
    states = []
    for backend in ("torch", "triton"):
        kept = tuple(one.clone() for one in state)
        h = slstm_step(x[:, 0].bfloat16(), R, b, kept, backend=backend)
        assert h.dtype == torch.bfloat16
        states.append((h, *kept))
    for a, b in zip(*states, strict=True):
        assert relative_error(b, a) < 1e-2


def test_the_step_is_an_operator_that_changes_its_state():
    (x, R, b), state = split(make_inputs(RESIDENT, 1, state=True))
    torch.library.opcheck(
        step_triton.slstm_step_triton,
        (x[:, 0], R, b, *state, True),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_what_it_cannot_run_is_refused_with_the_remedy():
    x, R, b = make_inputs((1, 1, 16), 2).values()
    with pytest.raises(ValueError, match=r"float64.*'torch'"):
        slstm_scan(x.double(), R, b, backend="triton")
    x, R, b = make_inputs((1, 1, 1040), 1).values()
    with pytest.raises(ValueError, match="1040 exceeds 1024"):
        slstm_scan(x, R, b, backend="triton")


def test_lengths_and_batches_are_not_specialised():
    from xlstm_kernels.slstm.triton import kernels as triton_kernels

    assert {"batch", "steps"} <= set(triton_kernels.SIZES)
    assert {"batch", "steps", "first", "last"} == set(triton_kernels.SIZES_AND_RANGE)
