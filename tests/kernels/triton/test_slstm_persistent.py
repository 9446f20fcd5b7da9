"""The persistent sLSTM in the interpreter, a launch for each step, against the step recurrence."""

import pytest
import torch

from tests.kernels.comparison import assert_float32_close, relative_error, run
from tests.kernels.slstm.test_numba import make_inputs, recurrence
from tests.kernels.slstm.test_scan import outputs, split
from xlstm_kernels import slstm_scan
from xlstm_kernels.common.backends import select_backend
from xlstm_kernels.slstm.triton import persistent_plan
from xlstm_kernels.slstm.triton import scan as scan_triton
from xlstm_kernels.slstm.triton.persistent_group import Group

SHAPE = (2, 2, 40)  # three programs for each head, of which the last has columns beyond it


@pytest.fixture
def launches(monkeypatch):
    """Names of the launches; programs of 16 columns."""

    def plan_group(batch, heads, d, device):
        tiles = -(-d // 16)
        return Group(16, tiles, heads * tiles * -(-batch // 16), 4)

    monkeypatch.setattr(persistent_plan, "plan_group", plan_group)
    names, run_all = [], scan_triton.run_all

    def recorded(planned, like):
        planned = list(planned)
        names.extend(launch.name for launch in planned)
        run_all(planned, like)

    monkeypatch.setattr(scan_triton, "run_all", recorded)
    return names


def scan(x, **options):
    arguments, state = split(x)
    result = slstm_scan(*arguments, state, return_last_state=True, backend="persistent", **options)
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


def test_it_runs_where_it_is_asked_for(launches):
    x, R, b = make_inputs((1, 1, 20), 1).values()
    for asked, name in (("triton", "slstm resident"), ("persistent", "slstm persistent")):
        launches.clear()
        slstm_scan(x, R, b, backend=asked)
        assert launches == [name]
    assert select_backend("slstm_scan", None, x, d=20) != "persistent"
    with pytest.raises(ValueError, match="exponential input gate only"):
        slstm_scan(x, R, b, input_gate="sigmoid", backend="persistent")
