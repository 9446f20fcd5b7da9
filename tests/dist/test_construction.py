"""What a rank holds of the model: its own share; one part more while building; nothing at last."""

import gc
import weakref
from unittest import mock

import pytest
from torch import nn

import pretrain.commands.run.train
from pretrain import layout as layouts
from pretrain.config import config_from_dict
from pretrain.engines import make_engine
from pretrain.watching.metrics import read_metrics
from tests.dist import work
from tests.dist.training_runs import tiny_run
from xlstm_mcore import build

pytestmark = pytest.mark.dist

DEEP = {"model__pattern": "M" * 8}


def parameters_alive():
    return [thing for thing in gc.get_objects() if isinstance(thing, nn.Parameter)]


def count_while_building(config):
    """(largest number of elements in parameters so far, of the largest part, of the model)."""
    layout = layouts.start(config)
    before = parameters_alive()
    initialize = build.initialize
    held, parts = [], []

    def count(part, *args):
        initialize(part, *args)
        alive = [p for p in parameters_alive() if all(p is not other for other in before)]
        shares = [p.ds_tensor for p in alive if hasattr(p, "ds_tensor")]
        held.append(sum(t.numel() for t in alive + shares))
        parts.append(sum(p.numel() for p in part.parameters()))

    with mock.patch.object(build, "initialize", count):
        engine = make_engine(config, layout)
    return max(held), max(parts), engine.num_parameters


def test_zero_3_never_holds_the_whole_model(pool):
    pytest.importorskip("deepspeed")
    config = work.run_config(
        "large", **DEEP, engine__name="deepspeed", engine__zero_stage=3, engine__precision="bf16"
    )
    for held, part, model in pool(4, count_while_building, config):
        assert model > 8 * part
        assert held < 1.05 * (model / 4 + part)


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_tensor_and_pipeline_ranks_build_their_own_share(pool, engine):
    pytest.importorskip("deepspeed")
    layout = {"layout__tensor": 2, "layout__pipeline": 2}
    config = work.run_config("large", **DEEP, **layout, engine__name=engine)
    for held, _, model in pool(4, count_while_building, config):
        assert held < 1.05 * model / 4


def alive_after_closing(config):
    """Elements of parameters that outlive an engine which has trained and was closed."""
    engine, layout = work.make_engine(config)
    work.train_steps(engine, layout, config, 0, 2)
    parameters = [weakref.ref(p) for model in engine.models for p in model.parameters()]
    engine.close()
    del engine
    gc.collect()
    return sum(p().numel() for p in parameters if p() is not None)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"engine__overlap_grad_reduce": True, "engine__overlap_param_gather": True},
        {"optimizer__name": "muon", "engine__zero_stage": 0},
        {"engine__name": "deepspeed"},
        {"engine__name": "deepspeed", "engine__precision": "bf16"},
        {"engine__name": "deepspeed", "engine__zero_stage": 2},
        {"engine__name": "deepspeed", "engine__zero_stage": 3},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "megatron",
)
def test_a_closed_engine_keeps_nothing(pool, changes):
    """The self-test trains three in one process."""
    if "engine__name" in changes:
        pytest.importorskip("deepspeed")
    assert pool(2, alive_after_closing, work.run_config("large", **changes)) == [0, 0]


def train(raw, drawn):
    """The exit code, and how many parts got initial values."""
    with mock.patch.object(build, "initialize", wraps=build.initialize) as initialize:
        code = pretrain.commands.run.train.main(config_from_dict(raw))
    assert bool(initialize.call_count) == drawn
    return code


def test_a_run_that_continues_draws_no_initial_values(pool, shards, tmp_path):
    assert pool(1, train, tiny_run(tmp_path, shards, run__steps=4), True) == [0]
    longer = tiny_run(tmp_path, shards, run__steps=6)
    assert pool(1, train, longer, False) == [0]
    losses = [one["loss"] for one in read_metrics(tmp_path / "metrics.jsonl") if "loss" in one]
    assert len(losses) == 6 and all(0 < loss < 7 for loss in losses)
