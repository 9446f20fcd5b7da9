"""The persistent sLSTM in the interpreter, a launch for each step, against the step recurrence."""

import pytest
import torch

from tests.kernels.comparison import assert_float32_close, relative_error, run
from tests.kernels.slstm.test_numba import make_inputs, recurrence
from tests.kernels.slstm.test_scan import outputs, split
from xlstm_kernels import slstm_scan
from xlstm_kernels.slstm.triton import persistent_plan
from xlstm_kernels.slstm.triton import scan as scan_triton

SHAPE = (2, 2, 40)  # three programs for each head, of which the last has columns beyond it


@pytest.fixture
def launches(monkeypatch):
    """Names of the launches; programs of 16 columns for every dtype and head."""
    streamed = scan_triton.Tiles(64, False, 64, 4, 1)
    monkeypatch.setattr(scan_triton, "tiles_for", lambda *_: streamed)

    def plan_group(batch, heads, d, dtype, device, rows):
        tiles = -(-d // 16)
        return persistent_plan.Group(16, tiles, heads * tiles * -(-batch // rows), 4)

    monkeypatch.setattr(persistent_plan, "plan_group", plan_group)
    monkeypatch.setenv("XLSTM_SLSTM_PERSISTENT", "1")
    names, run_all = [], scan_triton.run_all

    def recorded(planned, like):
        planned = list(planned)
        names.extend(launch.name for launch in planned)
        run_all(planned, like)

    monkeypatch.setattr(scan_triton, "run_all", recorded)
    return names


def scan(x, **options):
    arguments, state = split(x)
    result = slstm_scan(*arguments, state, return_last_state=True, backend="triton", **options)
    return outputs(*result)


@pytest.mark.parametrize(
    ("shape", "state"), [(SHAPE, True), (SHAPE, False), ((17, 1, 20), True)], ids=str
)
def test_values_states_and_gradients(launches, shape, state):
    boundaries = torch.zeros(shape[0], 3, dtype=torch.bool)
    boundaries[0, 1] = boundaries[1, 0] = boundaries[-1, 2] = True
    inputs = make_inputs(shape, 3, state=state)
    assert_float32_close(scan, recurrence, inputs, boundaries=boundaries)
    assert launches == ["slstm persistent"] * 6 + ["slstm first state"]


def test_bfloat16_without_boundaries(launches):
    inputs = {name: x.bfloat16() for name, x in make_inputs(SHAPE, 4, state=True).items()}
    exact = run(recurrence, inputs, torch.float64, forget_gate="exp")
    got = run(scan, inputs, torch.bfloat16, forget_gate="exp")
    for name, reference in exact.items():
        assert relative_error(got[name], reference) < 1e-2, name
    assert "slstm persistent" in launches


def test_it_is_off_until_it_is_asked_for(launches, monkeypatch):
    x, R, b = make_inputs((1, 1, 20), 1).values()
    for asked, name in (("0", "slstm streamed"), ("1", "slstm persistent")):
        monkeypatch.setenv("XLSTM_SLSTM_PERSISTENT", asked)
        launches.clear()
        slstm_scan(x, R, b, backend="triton")
        assert launches == [name]
