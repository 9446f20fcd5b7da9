"""Communication that overlaps with computation: the same numbers as without, or a refusal.

megatron-core's buckets hold 40 million gradients; with that size a tiny model has one, all of whose
weights arrive with the first module, and nothing can be seen to be forgotten. Here they are small.
"""

import functools
from unittest import mock

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig

from pretrain.checkpoint import resolve
from pretrain.engines import megatron
from pretrain.trainer import train_step
from tests.dist import work

pytestmark = pytest.mark.dist

GRADIENTS = {"engine__overlap_grad_reduce": True}
BOTH = {**GRADIENTS, "engine__overlap_param_gather": True}
TIED = {"model__tie_embeddings": True}
NO_LOGITS = {"memory__logits_mib": 0}  # the head's weight is read without its matrix product
MUON = {"optimizer__name": "muon", "engine__zero_stage": 0}
HELD_OPEN = {"model__mlstm_input_gate": False, "model__mlstm_forget_gate": False}
SELECTIVE = {"memory__recompute": "selective"}
TP_SP = {"layout__tensor": 2, "layout__sequence": True}
PP = {"layout__pipeline": 2}
VPP = {**PP, "layout__virtual": 2}
# Several micro-batches of a replica. Clipping would carry the norm's rounding into the weights.
RUN = {"data__global_batch": 8, "optimizer__clip_grad": 0.0}


def small_buckets(function, *args):
    """Call ``function`` with 4000 gradients in a bucket, or what the largest parameter needs."""
    settings = functools.partial(DistributedDataParallelConfig, bucket_size=4000)
    with mock.patch.object(megatron, "DistributedDataParallelConfig", settings):
        return function(*args)


def train_in_small_buckets(config):
    return small_buckets(work.train, config)


def compare(got, expected):
    """Losses and states bit for bit; norms are summed shard by shard, and buckets make shards."""
    for (steps, _), (true_steps, _) in zip(got, expected, strict=True):
        assert [loss for loss, _ in steps] == [loss for loss, _ in true_steps]
        norms = [norm for _, norm in true_steps]
        assert [norm for _, norm in steps] == pytest.approx(norms, rel=1e-6)
    tensors = work.assemble([chunks for _, chunks in got])
    for name, true in work.assemble([chunks for _, chunks in expected]).items():
        assert torch.equal(tensors.pop(name), true), name
    assert not tensors


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        pytest.param(2, {**BOTH, **NO_LOGITS}, id="dp2"),
        pytest.param(2, {**BOTH, **TIED}, id="dp2-tied"),
        pytest.param(2, {**GRADIENTS, **HELD_OPEN}, id="dp2-gates-without-effect"),
        pytest.param(2, {**GRADIENTS, **MUON}, id="dp2-muon"),
        pytest.param(2, {**BOTH, **SELECTIVE, "engine__precision": "bf16"}, id="bf16-selective"),
        pytest.param(2, {**BOTH, "memory__recompute": "full"}, id="dp2-recompute"),
        pytest.param(4, {**BOTH, **NO_LOGITS, **SELECTIVE, **TP_SP}, id="tp2-sp-selective"),
        pytest.param(4, {**BOTH, **TIED, **PP}, id="dp2-pp2"),
        pytest.param(4, {**BOTH, **VPP}, id="dp2-pp2-vpp2"),
        pytest.param(2, {**BOTH, **VPP}, id="pp2-vpp2"),
        pytest.param(2, {**BOTH, "layout__context": 2}, id="cp2"),
    ],
)
def test_overlap_changes_nothing(pool, ranks, changes):
    config = work.run_config("mixed", **RUN, **changes)
    plain = work.run_config("mixed", **RUN, **{**changes, **dict.fromkeys(BOTH, False)})
    compare(pool(ranks, train_in_small_buckets, config), pool(ranks, work.train, plain))


def train_ever_more_micro_batches(config):
    """Losses while the batch grows, as in a ramp, evaluated before each step; number of buckets."""
    engine, layout = work.make_engine(config)
    losses = []
    for step in range(3):
        batches = work.random_batches(config, step)[layout.dp_rank :: layout.dp_size]
        losses.append(engine.evaluate(batches[:1]).mean)
        losses.append(train_step(engine, batches[: 2**step], config.optimizer.lr).loss)
    return losses, len(engine.model_chunks[0].bucket_groups)


def train_ever_more_in_small_buckets(config):
    return small_buckets(train_ever_more_micro_batches, config)


def test_evaluations_see_new_weights_and_batches_may_grow(pool):
    config = work.run_config("mixed", **RUN, **BOTH)
    plain = work.run_config("mixed", **RUN)
    for (losses, buckets), (expected, one) in zip(
        pool(2, train_ever_more_in_small_buckets, config),
        pool(2, train_ever_more_micro_batches, plain),
        strict=True,
    ):
        assert losses == expected
        assert buckets > 5
        assert one == 1


def save_in_small_buckets(config, root):
    return small_buckets(work.train_and_save, config, root, 2, 3)


def resume_in_small_buckets(config, path):
    return small_buckets(work.resume, config, path, 2, 3)


@pytest.mark.parametrize("layout", [{}, VPP], ids=["dp2", "pp2-vpp2"])
def test_a_resume_with_overlap_is_exact(pool, tmp_path, layout):
    config = work.run_config("mixed", **RUN, **BOTH, **layout)
    expected = pool(2, save_in_small_buckets, config, str(tmp_path))
    got = pool(2, resume_in_small_buckets, config, str(resolve(tmp_path)))
    assert [steps for steps, _ in got] == [steps for steps, _ in expected]
    true = work.assemble([chunks for _, chunks in expected])
    for name, tensor in work.assemble([chunks for _, chunks in got]).items():
        assert torch.equal(tensor, true[name]), name


def train_around_in_small_buckets(config):
    return small_buckets(work.train_around_a_bad_step, config)


def test_a_gradient_that_is_not_finite_changes_nothing(pool):
    config = work.run_config("mixed", **RUN, **BOTH)
    clean = pool(2, work.train, work.run_config("mixed", **RUN), 2)
    for (bad, same, steps), (expected, _) in zip(
        pool(2, train_around_in_small_buckets, config), clean, strict=True
    ):
        assert bad == [True, True]
        assert same
        for values, true in zip(steps, expected, strict=True):
            assert values == pytest.approx(true, rel=1e-6)
