"""Dropout: other masks in every step, the same ones after a resume, and none in an evaluation."""

import pytest
import torch

import pretrain.commands.run.train
from pretrain.config import config_from_dict
from pretrain.trainer import train_step
from pretrain.watching.metrics import read_metrics
from tests.dist import work
from tests.dist.needs import needs_deepspeed
from tests.dist.training_runs import tiny_run

pytestmark = pytest.mark.dist

ZERO = {"engine__name": "deepspeed"}


def masks(config):
    """What a layer leaves of ones, by seed and step; the first once more at the end."""
    engine, layout = work.make_engine(config)
    layer = engine.models[0].decoder.layers[0].train()
    found = []
    for seed, step in ((3, 0), (3, 1), (4, 0), (3, 0)):
        layout.seed_step(seed, step)
        found.append(layer._dropout(torch.ones(64)))
    return found


@pytest.mark.parametrize("sequence", [False, True])
def test_a_mask_is_that_of_seed_step_and_token(pool, sequence):
    """Tensor-parallel ranks hold the same tokens, and with sequence parallelism other ones."""
    shape = {"layout__tensor": 2, "layout__sequence": sequence}
    ranks = pool(2, masks, work.run_config("large", model__dropout=0.5, **shape))
    for first, *others, again in ranks:
        assert torch.equal(first, again)
        assert not any(torch.equal(first, other) for other in others)
    assert torch.equal(ranks[0][0], ranks[1][0]) is not sequence


def losses(config):
    """Of a step, of two evaluations, and of a step again, all with the same weights."""
    engine, _ = work.make_engine(config)
    batches = work.random_batches(config, 0)
    before = train_step(engine, batches, 0.0).loss
    measured = [engine.evaluate(batches).mean for _ in range(2)]
    return before, *measured, train_step(engine, batches, 0.0).loss


@pytest.mark.parametrize(
    "engine",
    [
        {},
        pytest.param({**ZERO, "engine__zero_stage": 1}, marks=needs_deepspeed),
        pytest.param({**ZERO, "engine__zero_stage": 2}, marks=needs_deepspeed),
    ],
    ids=["megatron", "deepspeed-1", "deepspeed-2"],
)
def test_an_evaluation_is_without_it_and_the_next_step_with_it(pool, engine):
    config = work.run_config("large", model__dropout=0.5, **engine)
    ((before, measured, again, after),) = pool(1, losses, config)
    assert measured == again
    for loss in (before, after):
        assert loss != pytest.approx(measured, rel=1e-4)


def train(raw):
    return pretrain.commands.run.train.main(config_from_dict(raw))


def log(folder):
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


def test_a_run_that_resumes_draws_what_it_would_have_drawn(pool, shards, tmp_path):
    found = []
    for name, stops in (("whole", (4,)), ("cut", (2, 4))):
        for steps in stops:
            raw = tiny_run(tmp_path / name, shards, run__steps=steps, model__dropout=0.5)
            raw["schedule"] = {"name": "constant"}
            assert pool(1, train, raw) == [0]
        found.append(log(tmp_path / name))
    assert found[0] == found[1] and len(found[0]) == 4
