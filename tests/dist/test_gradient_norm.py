"""The norm of the gradient is that of fp64, whatever optimizer, precision and layout."""

import math

import pytest
import torch

from pretrain.engines.gradients import clip_gradients, sum_of_squares
from pretrain.trainer import train_step
from tests.dist import work
from tests.dist.needs import needs_deepspeed

CPU = torch.device("cpu")


def test_squares_are_added_in_fp64():
    rng = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(3_000_000, generator=rng),
        torch.randn(3, 70_001, generator=rng).t(),
        torch.randn((), generator=rng),
        torch.randn(5, 7, generator=rng).bfloat16(),
    ]
    expected = math.fsum(math.fsum(t.double().square().reshape(-1).tolist()) for t in tensors)
    assert sum_of_squares(tensors, CPU).item() == pytest.approx(expected, rel=1e-13)
    assert abs(tensors[0].norm().item() ** 2 / expected - 1) > 1e-5, "fp32 would do as well"


def test_without_gradients_it_is_0_and_what_is_not_finite_stays_so():
    assert sum_of_squares([], CPU).item() == 0.0
    assert sum_of_squares([torch.tensor([1.0, math.inf])], CPU).item() == math.inf
    assert math.isnan(sum_of_squares([torch.tensor([1.0, math.nan])], CPU).item())


@pytest.mark.parametrize(
    ("norm", "limit", "left"), [(0.5, 1.0, 0.5), (4.0, 1.0, 1.0), (4.0, 0.5, 0.5), (4.0, 0.0, 4.0)]
)
def test_gradients_are_scaled_down_and_never_up(norm, limit, left):
    parameters = [torch.zeros(n) for n in (3, 1, 2)]  # the last one has no gradient
    for parameter in parameters[:2]:
        parameter.grad = torch.full_like(parameter, norm / 2)
    clip_gradients(parameters, limit, torch.tensor(norm, dtype=torch.float64))
    assert sum_of_squares([p.grad for p in parameters[:2]], CPU).sqrt() == pytest.approx(left)


# Optimizer state after one step without clipping -> its share of the gradient.
MOMENTS = {"optimizer.state.exp_avg.": 1 - 0.9, "optimizer.state.momentum.": 1 - 0.95}


def norm_and_gradient(config):
    """The norm of one step, and the sum of squares of the gradient that this rank saves."""
    engine, layout = work.make_engine(config)
    batches = work.random_batches(config, 0)[layout.dp_rank :: layout.dp_size]
    result = train_step(engine, batches, config.optimizer.lr)
    squares = 0.0
    for part in engine.sharded_state():
        share = [share for prefix, share in MOMENTS.items() if part.name.startswith(prefix)]
        if share:
            squares += (part.tensor.double() / share[0]).square().sum().item()
    return result.grad_norm, squares


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {}),
        (2, {"layout__tensor": 2, "layout__sequence": True}),
        (2, {"layout__pipeline": 2, "model__tie_embeddings": True}),
        (1, {"optimizer__name": "muon"}),
        pytest.param(
            2, {"engine__name": "deepspeed", "engine__precision": "bf16"}, marks=needs_deepspeed
        ),
    ],
    ids=["one", "tp2-sp", "pp2-tied", "muon", "deepspeed-bf16-dp2"],
)
def test_the_norm_of_a_step_is_that_of_its_gradient_in_fp64(pool, ranks, changes):
    """A vocabulary of 40,000, over which an fp32 sum is visibly too small."""
    config = work.run_config(
        "large",
        model__vocab_size=40_000,
        optimizer__clip_grad=0.0,
        data__seq_len=8,
        **changes,
    )
    answers = pool(ranks, norm_and_gradient, config)
    expected = math.sqrt(math.fsum(squares for _, squares in answers))
    for norm, _ in answers:
        assert norm == pytest.approx(expected, rel=2e-7)
