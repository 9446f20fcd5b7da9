"""Every layout trains like one process: losses, gradient norms, moments and weights."""

import functools

import pytest
import torch

from tests.dist import work

LAYOUTS = {
    "tp2": (2, {"layout__tensor": 2}),
    "tp2_sp": (2, {"layout__tensor": 2, "layout__sequence": True}),
    "tp4_sp": (4, {"layout__tensor": 4, "layout__sequence": True}),
    "dp2": (2, {}),
    "dp2_tp2_sp": (4, {"layout__tensor": 2, "layout__sequence": True}),
    "dp3": (3, {}),
    "pp2": (2, {"layout__pipeline": 2}),
    "pp2_vpp2": (2, {"layout__pipeline": 2, "layout__virtual": 2}),
    "pp2_tp2_sp": (4, {"layout__pipeline": 2, "layout__tensor": 2, "layout__sequence": True}),
    "pp2_dp2": (4, {"layout__pipeline": 2}),
    "cp2": (2, {"layout__context": 2}),
    "cp4": (4, {"layout__context": 4}),
    "cp2_tp2": (4, {"layout__context": 2, "layout__tensor": 2}),
    "cp2_tp2_sp": (4, {"layout__context": 2, "layout__tensor": 2, "layout__sequence": True}),
    "cp2_dp2": (4, {"layout__context": 2}),
    "cp2_pp2": (4, {"layout__context": 2, "layout__pipeline": 2}),
    "cp2_pp2_vpp2": (
        4,
        {"layout__context": 2, "layout__pipeline": 2, "layout__virtual": 2},
    ),
}
CASES = [
    ("large", "tp2", {}),
    ("large", "tp2_sp", {}),
    ("large", "tp4_sp", {}),
    ("large", "dp2", {"data__micro_batch": 2}),
    ("hybrid", "dp3", {"data__fill_batch": True}),
    ("large", "dp2_tp2_sp", {}),
    ("large", "pp2", {"model__tie_embeddings": True}),
    ("large_deep", "pp2_vpp2", {}),
    ("large", "tp2_sp", {"model__tie_embeddings": True}),
    ("classic", "tp2", {}),
    ("classic", "tp2_sp", {}),
    ("classic", "tp4_sp", {}),
    ("classic", "dp2_tp2_sp", {}),
    ("classic", "pp2_tp2_sp", {}),
    ("mixed", "tp2_sp", {}),
    ("mixed", "pp2_dp2", {}),
    ("mixed", "pp2_vpp2", {"model__tie_embeddings": True}),
    ("hybrid", "tp2_sp", {}),
    ("large", "tp2_sp", {"model__tie_embeddings": True, "memory__logits_mib": 0}),
    ("classic", "pp2_tp2_sp", {"memory__logits_mib": 0, "memory__recompute": "full"}),
    ("mixed", "tp2_sp", {"memory__recompute": "selective"}),
    ("hybrid", "cp2", {"memory__logits_mib": 0}),
    ("hybrid", "cp2", {"model__attention_window": 5, "model__attention_sinks": 2}),
    ("classic", "cp2_tp2_sp", {"memory__recompute": "selective"}),
    ("large", "cp2", {"memory__recompute": "full"}),
    ("hybrid", "pp2", {}),
    ("baselines", "cp2_tp2_sp", {"memory__recompute": "selective"}),
    ("large", "cp4", {}),
    ("large", "cp2_pp2", {"model__tie_embeddings": True}),
    ("large_deep", "cp2_pp2_vpp2", {}),
    ("classic", "cp4", {}),
    ("mixed", "cp2_tp2", {}),
    ("mixed", "cp2_dp2", {}),
]
IDS = ["-".join([m, n, *(f"{key.split('__')[1]}={c[key]}" for key in c)]) for m, n, c in CASES]


def _of_the_model(changes):
    """What one process is built with: how memory is used must not matter."""
    return tuple((key, value) for key, value in changes.items() if not key.startswith("memory"))


@pytest.fixture(scope="module")
def one_process(pool):
    """Results of one process, computed once per model."""

    @functools.cache
    def results(model: str, changes: tuple):
        ((steps, chunks),) = pool(1, work.train, work.run_config(model, **dict(changes)))
        return steps, work.assemble([chunks])

    return results


@pytest.fixture(scope="module")
def one_gradient(pool):
    """The fp64 gradient of one process, computed once per model."""

    @functools.cache
    def results(model: str, changes: tuple):
        config = work.run_config(model, **dict(changes))
        ((loss, chunks),) = pool(1, work.fp64_gradients, config)
        return loss, work.assemble([chunks])

    return results


@pytest.mark.dist
@pytest.mark.parametrize(
    ("model", "layout", "changes"),
    CASES,
    ids=IDS,
)
def test_layout_equals_one_process(pool, one_process, model, layout, changes):
    ranks, shape = LAYOUTS[layout]
    expected, state = one_process(model, _of_the_model(changes))
    config = work.run_config(model, **shape, **changes)
    answers = pool(ranks, work.train, config)
    for steps, _ in answers:  # every rank reports the same, right numbers
        for (loss, norm), (true_loss, true_norm) in zip(steps, expected, strict=True):
            assert loss == pytest.approx(true_loss, rel=2e-6)
            assert norm == pytest.approx(true_norm, rel=1e-5)
    got = work.assemble([chunks for _, chunks in answers])
    assert got.keys() == state.keys()
    for name, value in state.items():
        error = (got[name] - value).abs().max() / value.abs().max().clamp(min=1e-12)
        # Adam divides by the root of the second moment, which blows rounding up in weights whose
        # gradient is tiny; the moments themselves are the gradients.
        limit = 1e-4 if "exp_avg" not in name else 3e-4
        assert error < limit, f"{name}: {error:.2e}"


@pytest.mark.dist
@pytest.mark.parametrize(
    ("model", "layout", "changes"),
    CASES,
    ids=IDS,
)
def test_gradients_equal_one_process_in_fp64(pool, one_gradient, model, layout, changes):
    """Nothing hides behind rounding here: a forgotten sum of 1e-8 would show."""
    ranks, shape = LAYOUTS[layout]
    loss, gradients = one_gradient(model, _of_the_model(changes))
    answers = pool(ranks, work.fp64_gradients, work.run_config(model, **shape, **changes))
    for other, _ in answers:
        assert other == pytest.approx(loss, rel=1e-12)
    got = work.assemble([chunks for _, chunks in answers])
    assert got.keys() == gradients.keys()
    for name, value in gradients.items():
        error = (got[name] - value).abs().max() / value.abs().max()
        assert error < 1e-10, f"{name}: {error:.2e}"


@pytest.mark.dist
def test_losses_fall_and_states_are_finite(one_process):
    for model in ("large", "classic"):
        steps, state = one_process(model, ())
        assert steps[-1][0] < steps[0][0]
        assert all(torch.isfinite(value).all() for value in state.values())
