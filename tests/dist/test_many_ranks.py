"""Layouts of 8 and 16 processes, and 300 steps: rounding must not grow into a trend.

One layout of 8 processes always runs. The others need memory and minutes: `--many-ranks`.
"""

import pytest

from tests.dist import work
from tests.dist.needs import needs_deepspeed
from tests.dist.process_pool import ProcessPool
from xlstm_io.checkpoint.manifest import OPTIMIZER_PREFIX

pytestmark = pytest.mark.dist

TP2 = {"layout__tensor": 2, "layout__sequence": True}
TP2_PP2_CP2 = {**TP2, "layout__pipeline": 2, "layout__context": 2}
ROWS = {"data__global_batch": 8}  # with 16 processes, one micro-batch for each stage of a replica
LAYOUTS = {
    "tp2_pp2_cp2_dp2": (16, "hybrid", TP2_PP2_CP2),
    "tp4_dp4": (16, "classic", {"layout__tensor": 4, "layout__sequence": True}),
    "pp4_vpp2_dp2_tp2": (16, "deep", {**TP2, "layout__pipeline": 4, "layout__virtual": 2}),
}


def by_command(request):
    if not request.config.getoption("--many-ranks"):
        pytest.skip("runs with --many-ranks")


@pytest.fixture(scope="module")
def many():
    """Processes that end with this module: 16 of them hold 8 GiB."""
    with ProcessPool(16, timeout_s=1200) as processes:
        yield processes


def assert_gradients_equal_one_process(pool, ranks, model, changes):
    """As in test_parallel.py, in fp64."""
    # Tensor and context parallelism both share out the heads of keys and values.
    rows = ROWS | ({"model__attention_kv_heads": 4} if model == "hybrid" else {})
    ((loss, parts),) = pool(1, work.fp64_gradients, work.run_config(model, **rows))
    expected = work.assemble([parts])
    answers = pool(ranks, work.fp64_gradients, work.run_config(model, **rows, **changes))
    for other, _ in answers:
        assert other == pytest.approx(loss, rel=1e-12)
    got = work.assemble([parts for _, parts in answers])
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = (got[name] - value).abs().max() / value.abs().max()
        assert error < 1e-10, f"{name}: {error:.2e}"


def test_all_kinds_of_parallelism_at_once_on_eight_processes(many):
    assert_gradients_equal_one_process(many, 8, "hybrid", TP2_PP2_CP2)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_on_sixteen_processes(request, many, name):
    by_command(request)
    assert_gradients_equal_one_process(many, *LAYOUTS[name])


@needs_deepspeed
def test_zero_3_with_tensor_parallelism_on_eight_processes(request, many):
    by_command(request)
    ((expected, parts),) = many(1, work.train, work.run_config("mixed", **ROWS))
    state = work.assemble([parts])
    changes = {"engine__name": "deepspeed", "engine__zero_stage": 3, **TP2, **ROWS}
    answers = many(8, work.train, work.run_config("mixed", **changes))
    for steps, _ in answers:
        for (loss, norm), (true_loss, true_norm) in zip(steps, expected, strict=True):
            assert loss == pytest.approx(true_loss, rel=2e-6)
            assert norm == pytest.approx(true_norm, rel=1e-5)
    got = work.assemble([parts for _, parts in answers])
    for name, value in state.items():
        error = (got[name] - value).abs().max() / value.abs().max().clamp(min=1e-12)
        assert error < 1e-4, f"{name}: {error:.2e}"


EARLY, LATE = 50, 300  # steps


def weights_after(pool, ranks, steps, **changes):
    """Whole weights after so many steps of a model with all kinds of blocks."""
    answers = pool(ranks, work.train, work.run_config("mixed", **changes), steps)
    whole = work.assemble([parts for _, parts in answers])
    return {name: x for name, x in whole.items() if not name.startswith(OPTIMIZER_PREFIX)}


@pytest.fixture(scope="module")
def alone(request, many):
    """Weights of one process, and of one that adds the same gradients in another order."""
    by_command(request)
    return {
        steps: (weights_after(many, 1, steps), weights_after(many, 1, steps, data__micro_batch=2))
        for steps in (EARLY, LATE)
    }


@pytest.mark.parametrize("ranks", [2, 4])
def test_rounding_does_not_grow_into_a_trend(many, alone, ranks):
    """Tensor by tensor, a layout stays as near to one process as one process does to itself.

    Training makes any difference of rounding grow. A rounding that always errs to the same side
    would be seven times as far as another order of sums after 50 steps, however it grows then.
    """
    for steps, (exact, reordered) in alone.items():
        layout = weights_after(many, ranks, steps, **TP2)
        distances = {
            name: [float((x[name] - value).norm() / value.norm()) for x in (layout, reordered)]
            for name, value in exact.items()
        }
        most = [f"{max(column):.1e}" for column in zip(*distances.values(), strict=True)]
        print(f"{steps} steps: {ranks} processes {most[0]}, another order {most[1]}")
        for name, (away, other) in distances.items():
            assert away < 3 * other + 1e-7, (steps, name)
