"""A task with labels trains alike on every layout and engine, in rows with several samples."""

from unittest import mock

import pytest

from tests.data_prep.small_corpus import run
from tests.dist import work
from tests.dist.needs import needs_deepspeed

SEQ_LEN = 24
MEGATRON = {
    "dp2_tp2_sp": (4, {"layout__tensor": 2, "layout__sequence": True}),
    "cp2_pp2": (4, {"layout__context": 2, "layout__pipeline": 2}),
}
DEEPSPEED = {
    "zero3": (2, {"engine__zero_stage": 3}),
    "zero1_pp2": (2, {"engine__zero_stage": 1, "layout__pipeline": 2}),
}

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    out = tmp_path_factory.mktemp("task")
    flags = ["--length", "2-22", "--seq-len", SEQ_LEN, "--samples", 60, "--validation-samples", 5]
    assert run("synthetic", "repetition", "--out", out, *flags) == 0
    return out / "train"


def batches_of(config, step):
    """All micro-batches of a step of the run, from its shards."""
    from pretrain.data import TrainLoader, open_plan

    data = config.data
    plan = open_plan(data, config.run.seed)
    with TrainLoader(plan, data.ramp, micro_batch=data.micro_batch, step=step) as loader:
        return next(loader)


def on_shards(function, *arguments):
    """One of the functions of `work`, on the batches of the shards."""
    with mock.patch.object(work, "random_batches", batches_of):
        return function(*arguments)


def run_config(task, **changes):
    return work.run_config("large", data__path=str(task), data__seq_len=SEQ_LEN, **changes)


@pytest.mark.parametrize("cell", MEGATRON)
def test_gradients_of_a_labelled_task_are_those_of_one_process(pool, task, cell):
    ranks, changes = MEGATRON[cell]
    ((loss, slices),) = pool(1, on_shards, work.fp64_gradients, run_config(task))
    expected = work.assemble([slices])
    answers = pool(ranks, on_shards, work.fp64_gradients, run_config(task, **changes))
    assert all(other == pytest.approx(loss, rel=1e-12) for other, _ in answers)
    got = work.assemble([slices for _, slices in answers])
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = (got[name] - value).abs().max() / value.abs().max()
        assert error < 1e-10, f"{name}: {error:.2e}"


@pytest.fixture(scope="module")
def one_process(pool, task):
    """Losses and gradient norms of a few steps."""
    ((steps, _),) = pool(1, on_shards, work.train, run_config(task))
    return steps


@needs_deepspeed
@pytest.mark.parametrize("cell", DEEPSPEED)
def test_deepspeed_trains_a_labelled_task_as_one_process(pool, task, one_process, cell):
    ranks, changes = DEEPSPEED[cell]
    config = run_config(task, engine__name="deepspeed", **changes)
    for steps, _ in pool(ranks, on_shards, work.train, config):
        for (loss, norm), (true_loss, true_norm) in zip(steps, one_process, strict=True):
            assert loss == pytest.approx(true_loss, rel=2e-6)
            assert norm == pytest.approx(true_norm, rel=1e-5)


def answers_of(config):
    """Losses and hits of a batch, and the model's own losses."""
    import torch

    from pretrain import layout as layouts
    from pretrain.evaluation.answers import losses_and_hits

    layout = layouts.start(config)
    model_config = work.make_config(config.model, layout=config.layout, memory=config.memory)
    (model,) = work.build_model(model_config, layout.groups, config.run.seed)
    work.perturb([model])
    batch = work.random_batches(config, 0)[0]
    with torch.no_grad():
        losses, hits = losses_and_hits(model, batch)
        return losses, hits, model(batch.tokens, batch.boundaries, batch.labels)


def test_tensor_parallel_ranks_find_the_same_answers(pool):
    rows = {"data__micro_batch": 2}
    ((losses, hits, own),) = pool(1, answers_of, work.run_config("large", **rows))
    assert losses.shape == hits.shape == (2, 24)
    assert losses.flatten().tolist() == pytest.approx(own.flatten().tolist(), abs=1e-5)
    halves = {"layout__tensor": 2, "layout__sequence": True}
    for theirs, found, _ in pool(2, answers_of, work.run_config("large", **rows, **halves)):
        assert theirs.flatten().tolist() == pytest.approx(losses.flatten().tolist(), abs=1e-4)
        assert found.equal(hits)
