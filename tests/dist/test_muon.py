"""Muon: whole hidden matrices one by one, the same on every layout that it is offered on."""

import pytest
import torch

from pretrain.checkpoint import find_latest
from pretrain.engines.state import shared_out
from tests.dist import work
from xlstm_mcore.parameters.decay import decays, is_hidden_matrix

MODEL = "mixed"
MUON = {"optimizer__name": "muon", "engine__zero_stage": 0}
PREFIX = "optimizer.state.param."


@pytest.fixture(scope="module")
def one_process(pool):
    ((steps, chunks),) = pool(1, work.train, work.run_config(MODEL, **MUON))
    return steps, work.assemble([chunks])


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "shape"),
    [
        (2, {}),
        (2, {"layout__pipeline": 2, "model__tie_embeddings": True}),
        (4, {"layout__pipeline": 2, "layout__virtual": 2}),
        (2, {"layout__context": 2}),
        (2, {"layout__tensor": 2}),
        (4, {"layout__tensor": 2, "layout__sequence": True}),
    ],
    ids=["dp2", "pp2-tied", "dp2-pp2-vpp2", "cp2", "tp2", "dp2-tp2-sp"],
)
def test_layout_equals_one_process(pool, one_process, ranks, shape):
    tied = {key: value for key, value in shape.items() if key.startswith("model")}
    expected, state = one_process
    if tied:
        ((expected, chunks),) = pool(1, work.train, work.run_config(MODEL, **MUON, **tied))
        state = work.assemble([chunks])
    answers = pool(ranks, work.train, work.run_config(MODEL, **MUON, **shape))
    got = work.assemble([chunks for _, chunks in answers])
    assert got.keys() == state.keys()
    # The iteration runs in bf16: a rounding error of 1e-7 in the gradient may become one of 1e-2
    # in single entries of the update. The first step has no such history.
    for steps, _ in answers:
        assert steps[0][0] == pytest.approx(expected[0][0], rel=2e-6)
        assert steps[0][1] == pytest.approx(expected[0][1], rel=1e-5)
        for (loss, norm), (true_loss, true_norm) in zip(steps, expected, strict=True):
            assert loss == pytest.approx(true_loss, rel=2e-4)
            assert norm == pytest.approx(true_norm, rel=5e-3)
    for name, value in state.items():
        error = (got[name] - value).norm() / value.norm().clamp(min=1e-9)
        assert error < 1e-2, f"{name}: {error:.2e}"


@pytest.mark.dist
@pytest.mark.parametrize("shape", [{}, {"layout__tensor": 2}], ids=["dp2", "tp2"])
def test_ranks_share_out_the_state(pool, shape):
    """Every element of it is saved once, and each of two ranks holds about half."""
    answers = pool(2, work.train, work.run_config(MODEL, **MUON, **shape), 1)
    sizes = []
    for _, chunks in answers:
        own = [chunk for chunk in chunks if chunk.name.startswith("optimizer.state.momentum")]
        sizes.append(sum(chunk.tensor.numel() for chunk in own))
    assert min(sizes) > 0.3 * sum(sizes)


def test_the_largest_go_to_those_that_have_least():
    assert shared_out([5, 9, 4, 2], 2) == [1, 0, 1, 0]
    assert shared_out([1], 3) == [0]
    assert shared_out([], 2) == []


@pytest.mark.dist
def test_first_update_is_muons_for_each_matrix_by_itself(pool):
    """Against torch's optimizers on unpacked tensors, with the gradient that AdamW's run saw.

    Momentum, and what decays, are not those of the defaults.
    """
    changes = {"optimizer__clip_grad": 0.0}
    gradients = {
        name.removeprefix("optimizer.state.exp_avg."): value / (1 - 0.9)
        for name, value in work.assemble(
            pool(1, work.first_moments, work.run_config(MODEL, **changes))
        ).items()
    }
    own = {"muon_momentum": 0.8, "weight_decay": 0.5, "decay": {"norm": True, "projection": False}}
    changes |= {f"optimizer__{key}": value for key, value in own.items()}
    config = work.run_config(MODEL, **MUON, **changes)
    ((_, start),) = pool(1, work.train, config, 0)
    ((_, end),) = pool(1, work.train, config, 1)
    start, end = work.assemble([start]), work.assemble([end])
    options, matrices = config.optimizer, 0
    assert len(gradients) == sum(name.startswith(PREFIX) for name in start)
    for name, gradient in gradients.items():
        parameter = start[PREFIX + name].float().requires_grad_()
        parameter.grad = gradient.float()
        decay = options.weight_decay if decays(name, options.decay) else 0.0
        if is_hidden_matrix(name, parameter.shape):
            matrices += 1
            optimizer = torch.optim.Muon(
                [parameter],
                options.lr,
                decay,
                options.muon_momentum,
                adjust_lr_fn="match_rms_adamw",
            )
            momentum = end[f"optimizer.state.momentum.{name}"]
            assert (momentum - 0.2 * gradient).norm() < 1e-5 * gradient.norm(), name
        else:
            optimizer = torch.optim.AdamW(
                [parameter], options.lr, options.betas, options.eps, weight_decay=decay
            )
        optimizer.step()
        moved = (end[PREFIX + name] - start[PREFIX + name]).norm()
        difference = (end[PREFIX + name] - parameter.detach()).norm()
        assert difference <= 2e-2 * moved, f"{name}: {difference / moved:.2e}"
    assert matrices == 8 + 2 * 3 + 3  # M: q k v o out gate up down; two s: ffn; m: up z down


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_exact(pool, tmp_path, precision):
    config = work.run_config(MODEL, **MUON, engine__precision=precision)
    answers = pool(2, work.train_and_save, config, str(tmp_path), 2, 2)
    again = pool(2, work.resume, config, str(find_latest(tmp_path)), 2, 2)
    assert again[0][0] == answers[0][0]
    state = work.assemble([chunks for _, chunks in answers])
    got = work.assemble([chunks for _, chunks in again])
    assert all(torch.equal(got[name], value) for name, value in state.items())
