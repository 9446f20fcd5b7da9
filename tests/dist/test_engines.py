"""Cells of the support matrix equal one process: drawn from it until every two values met."""

from unittest import mock

import pytest
import torch

from pretrain.config import OptimizerConfig, support
from tests.dist import work
from tests.dist.matrix import covering, name, ranks_and_changes
from tests.dist.needs import needs_deepspeed

pytestmark = [
    pytest.mark.dist,
    needs_deepspeed,
]

MODEL = "mixed"
TIED = {"model__tie_embeddings": True}


# Megatron's engine has tests of its own, on more models (test_parallel.py).
CELLS = [c for c in support.supported() if c.engine == "deepspeed"]
FP32 = [c for c in CELLS if c.precision == "fp32"]
SEED = 2


def axes(cell):
    """Tensor with sequence is one axis and so is pipeline with virtual.

    So every stage meets TP alone, TP with SP and neither.
    """
    tensor, pipeline = (cell.tensor, cell.sequence), (cell.pipeline, cell.virtual)
    return cell.zero_stage, cell.offload, tensor, pipeline, cell.overlap_grad_reduce


BF16 = [
    c
    for c in CELLS
    if (c.precision, c.grad_reduce) == ("bf16", "fp32") and not (c.tensor or c.overlap_grad_reduce)
]


@pytest.fixture(scope="module")
def one_process(pool):
    """Losses, norms and state of Megatron's engine on one process."""
    ((steps, chunks),) = pool(1, work.train, work.run_config(MODEL, **TIED))
    return steps, work.assemble([chunks])


@pytest.mark.parametrize("cell", covering(FP32, axes, SEED), ids=name)
def test_cell_equals_one_process(pool, one_process, cell):
    ranks, changes = ranks_and_changes(cell)
    check_equal(pool(ranks, work.train, work.run_config(MODEL, **TIED, **changes)), one_process)


def check_equal(answers, one_process):
    """Losses, norms and state of all ranks are those of one process, to rounding."""
    expected, state = one_process
    for steps, _ in answers:
        for (loss, norm), (true_loss, true_norm) in zip(steps, expected, strict=True):
            assert loss == pytest.approx(true_loss, rel=2e-6)
            assert norm == pytest.approx(true_norm, rel=1e-5)
    got = work.assemble([chunks for _, chunks in answers])
    assert got.keys() == state.keys()
    for key, value in state.items():
        error = (got[key] - value).abs().max() / value.abs().max().clamp(min=1e-12)
        assert error < 1e-4, f"{key}: {error:.2e}"


def train_without_persistent_weights(config):
    """As `work.train`, with no weight small enough to stay whole: all are gathered and released."""
    from pretrain.engines.deepspeed import DeepSpeedEngine

    settings = DeepSpeedEngine._settings

    def with_none(engine):
        found = settings(engine)
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    with mock.patch.object(DeepSpeedEngine, "_settings", with_none):
        return work.train(config)


@pytest.mark.parametrize("train", [work.train, train_without_persistent_weights])
@pytest.mark.parametrize("mode", ["selective", "cells"])
def test_zero_3_has_the_weights_of_norms_that_are_computed_again(pool, one_process, mode, train):
    zero_3 = {"engine__name": "deepspeed", "engine__zero_stage": 3}
    overlapping = {"engine__overlap_grad_reduce": True}
    config = work.run_config(MODEL, **TIED, **zero_3, **overlapping, memory__recompute=mode)
    check_equal(pool(2, train, config), one_process)


MICRO_BATCHES = {"data__seq_len": 32, "data__global_batch": 8, "optimizer__clip_grad": 0.0}


def relative_errors(got, expected):
    assert got.keys() == expected.keys()
    return {
        key: ((got[key] - value).norm() / value.norm().clamp(min=1e-12)).item()
        for key, value in expected.items()
    }


BF16_TENSOR = [
    c
    for c in support.supported()
    if (c.precision, c.grad_reduce) == ("bf16", "fp32")
    and (c.tensor, c.optimizer) == (True, "adamw")
    and (c.offload == "none" or (c.offload, c.zero_stage) == ("optimizer", 1))
    and not (c.pipeline or c.context or c.overlap_grad_reduce)
]


@pytest.mark.parametrize("cell", BF16 + BF16_TENSOR, ids=name)
def test_gradients_are_summed_in_fp32(pool, cell):
    """In the buffer and through the reduction: a single rounding to bf16 would show as 1e-3."""
    ranks, changes = ranks_and_changes(cell)
    ranks = ranks if cell.tensor else min(ranks, 2)
    model = "large" if cell.tensor else MODEL
    config = work.run_config(model, **changes, **MICRO_BATCHES)
    answers = pool(ranks, work.first_moments_two_ways, config)
    at_once, by_few = (work.assemble(chunks) for chunks in zip(*answers, strict=True))
    errors = relative_errors(at_once, by_few)
    assert max(errors.values()) < 1e-6, errors


ZERO = {"engine__name": "deepspeed"}


@pytest.mark.parametrize(
    "engine",
    [{}, *(ZERO | {"engine__zero_stage": stage} for stage in (1, 2, 3))],
    ids=lambda changes: "-".join(str(value) for value in changes.values()) or "megatron",
)
def test_gradients_reduced_in_bf16_are_the_same_to_its_rounding(pool, engine):
    """Each is off by a rounding or a few, and not by none: the messages are narrow."""
    shape = {"engine__precision": "bf16", "optimizer__clip_grad": 0.0}
    found = {}
    for kind in ("fp32", "bf16"):
        config = work.run_config(MODEL, **shape, **engine, engine__grad_reduce=kind)
        found[kind] = work.assemble(pool(2, work.first_moments, config))
    errors = relative_errors(found["bf16"], found["fp32"])
    assert max(errors.values()) < 1e-2, errors
    assert max(errors.values()) > 1e-4, errors


TP2 = {"layout__tensor": 2, "layout__sequence": True}


@pytest.mark.parametrize(
    "changes",
    [
        {"engine__zero_stage": 1},
        {"engine__zero_stage": 1, "layout__pipeline": 2},
        {"engine__zero_stage": 1, "engine__precision": "bf16"},
        {"engine__zero_stage": 2, "engine__offload": "optimizer"},
        {"engine__zero_stage": 2},
        {"engine__zero_stage": 3},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_a_gradient_that_is_not_finite_changes_nothing(pool, changes):
    config = work.run_config(MODEL, **ZERO, **changes)
    clean = pool(2, work.train, config, 2)
    for (bad, same, steps), (expected, _) in zip(
        pool(2, work.train_around_a_bad_step, config), clean, strict=True
    ):
        assert bad == [True, True]
        assert same
        assert steps == expected


def train_without_the_sequence_hook(config):
    from pretrain.engines import deepspeed

    with mock.patch.object(deepspeed, "_sum_over", lambda tensor, group: tensor):
        return work.train(config, 1)[0]


def test_the_sequence_parallel_hook_is_needed(pool, one_process):
    """Without it norms' gradients lack the other ranks' positions: no error, wrong numbers."""
    expected, _ = one_process
    config = work.run_config(MODEL, **TIED, **ZERO, **TP2)
    ((loss, norm),), _ = pool(2, train_without_the_sequence_hook, config)
    assert loss == pytest.approx(expected[0][0], rel=2e-6)
    assert norm != pytest.approx(expected[0][1], rel=1e-4)


def start_with_a_shard_that_is_not_marked(config):
    original = work.perturb

    def unmark(models):
        original(models)
        for parameter in models[0].parameters():
            parameter.tensor_model_parallel = False

    with mock.patch.object(work, "perturb", unmark):
        try:
            work.make_engine(config)
        except AssertionError as error:
            return str(error)
    return "started"


def test_a_sharded_weight_must_be_marked(pool):
    """DeepSpeed would leave the other ranks' shards out of the gradient norm, without an error."""
    config = work.run_config(MODEL, **ZERO, **TP2)
    assert pool(2, start_with_a_shard_that_is_not_marked, config)[0].startswith("embedding.")


# Values that are not the defaults, and not those of `work.run_config`.
KEYS = {
    "lr": 5e-3,
    "betas": ([0.8, 0.95], [0.9, 0.8]),
    "eps": 1e-1,
    "muon_momentum": 0.5,
    "weight_decay": 0.5,
    "decay": ({"norm": True}, {"projection": False}),
    "clip_grad": 0.1,
}


def masters_after_two_steps(config):
    parts = work.train(config, 2)[1]
    return torch.cat([part.tensor.flatten() for part in parts if ".param." in part.name])


@pytest.mark.parametrize(
    "engine",
    [{}, {"optimizer__name": "muon"}, *(ZERO | {"engine__zero_stage": n} for n in (1, 3))],
    ids=lambda changes: "-".join(map(str, changes.values())) or "adamw",
)
def test_every_key_of_the_optimizer_changes_the_weights(pool, engine):
    """One that is read nowhere would have its default on every layout, and equal one process."""
    assert KEYS.keys() | {"name"} == set(OptimizerConfig.model_fields)
    changes = [
        {key: value}
        for key, values in KEYS.items()
        for value in (values if isinstance(values, tuple) else (values,))
        if key != "muon_momentum" or engine.get("optimizer__name") == "muon"
    ]
    usual, *found = (
        pool(
            1,
            masters_after_two_steps,
            work.run_config("large", **engine, **{f"optimizer__{k}": v for k, v in change.items()}),
        )[0]
        for change in ({}, *changes)
    )
    for change, masters in zip(changes, found, strict=True):
        assert (masters - usual).abs().max() > 1e-6, change


def test_nothing_is_compiled_and_nothing_is_taken_for_ulysses(pool):
    assert all(pool(2, startup_facts, work.run_config(MODEL, **ZERO, **TP2)))


def startup_facts(config):
    engine, _ = work.make_engine(config)
    import deepspeed
    from deepspeed.comm import comm

    return (
        comm.cdb.shm_comm_op is None
        and not [name for name in dir(engine.engine.mpu) if "sequence_parallel" in name]
        and type(engine.engine.basic_optimizer) is deepspeed.runtime.engine.torch.optim.AdamW
    )
