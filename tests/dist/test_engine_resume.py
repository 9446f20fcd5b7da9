"""One checkpoint for both engines: what one saved the other continues."""

import pytest
import torch

from pretrain.checkpoint import find_latest
from pretrain.engines import model
from tests.dist import work
from tests.dist.needs import needs_deepspeed
from xlstm_io.checkpoint.manifest import is_weight

pytestmark = [
    pytest.mark.dist,
    needs_deepspeed,
]

MODEL = "mixed"
STEPS, MORE = 2, 3
TP2 = {"layout__tensor": 2, "layout__sequence": True}
PP2 = {"layout__pipeline": 2}


def zero(stage, offload="none"):
    return {
        "engine__name": "deepspeed",
        "engine__zero_stage": stage,
        "engine__offload": offload,
    }


RUNS = {
    "megatron-tp2": (2, TP2),
    "megatron-one": (1, {}),
    "megatron-dp2": (2, {}),
    "zero1-pp2": (2, zero(1) | PP2),
    "zero1-offload-dp2": (2, zero(1, "optimizer")),
    "zero2-dp2": (2, zero(2)),
    "zero3-dp2": (2, zero(3)),
    "zero3-offload-tp2-dp2": (4, zero(3, "parameters") | TP2),
}
PAIRS = [
    ("megatron-tp2", "zero1-pp2"),
    ("megatron-tp2", "zero2-dp2"),
    ("megatron-tp2", "zero3-offload-tp2-dp2"),
    ("zero1-pp2", "zero1-pp2"),
    ("zero1-pp2", "megatron-tp2"),
    ("zero1-pp2", "zero3-dp2"),
    ("zero2-dp2", "zero2-dp2"),
    ("zero2-dp2", "megatron-one"),
    ("zero3-offload-tp2-dp2", "zero3-offload-tp2-dp2"),
    ("zero3-offload-tp2-dp2", "megatron-dp2"),
    ("zero3-offload-tp2-dp2", "zero1-offload-dp2"),
]


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    """Checkpoint, uninterrupted results and state of a run that is named, saved once."""
    done = {}

    def save(name):
        if name not in done:
            ranks, changes = RUNS[name]
            root = tmp_path_factory.mktemp(name)
            config = work.run_config(MODEL, **changes)
            answers = pool(ranks, work.train_and_save, config, str(root), STEPS, MORE)
            state = work.assemble([chunks for _, chunks in answers])
            done[name] = find_latest(root), answers[0][0], state
        return done[name]

    return save


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=[f"{a}_to_{b}" for a, b in PAIRS])
def test_resume_across_engines(pool, saved, source, target):
    path, expected, state = saved(source)
    ranks, changes = RUNS[target]
    config = work.run_config(MODEL, **changes)
    answers = pool(ranks, work.resume, config, str(path), STEPS, MORE)
    exact = source == target
    for steps, _ in answers:
        for (loss, norm), (true_loss, true_norm) in zip(steps, expected, strict=True):
            assert loss == (true_loss if exact else pytest.approx(true_loss, rel=1e-5))
            assert norm == (true_norm if exact else pytest.approx(true_norm, rel=1e-5))
    got = work.assemble([chunks for _, chunks in answers])
    assert got.keys() == state.keys()
    for name, value in state.items():
        if exact:
            assert torch.equal(got[name], value), name
        else:
            error = (got[name] - value).abs().max() / value.abs().max().clamp(min=1e-12)
            assert error < 3e-4, f"{name}: {error:.2e}"


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_resumes_exactly(pool, tmp_path, stage):
    """Weights in bf16 and masters in fp32: both are in the checkpoint, each split as it is."""
    config = work.run_config(MODEL, engine__precision="bf16", **zero(stage))
    answers = pool(2, work.train_and_save, config, str(tmp_path), STEPS, MORE)
    assert {c.tensor.dtype for c in answers[0][1] if c.name.startswith("decoder")} == {
        torch.bfloat16
    }
    again = pool(2, work.resume, config, str(find_latest(tmp_path)), STEPS, MORE)
    assert again[0][0] == answers[0][0]
    state = work.assemble([chunks for _, chunks in answers])
    got = work.assemble([chunks for _, chunks in again])
    assert all(torch.equal(got[name], value) for name, value in state.items())


def where_the_state_lies(config):
    """Whether every saved slice is a view of what the optimizer or model holds."""
    from pretrain.engines import deepspeed_compat as compat

    engine, _ = work.make_engine(config)
    optimizer = engine.engine.optimizer
    own = {flat.untyped_storage().data_ptr() for flat in compat.flat_partitions(optimizer)}
    for flat in compat.flat_partitions(optimizer):
        state = optimizer.optimizer.state[flat]
        own |= {state[key].untyped_storage().data_ptr() for key in ("exp_avg", "exp_avg_sq")}
    for parameter in engine.engine.module.parameters():
        held = parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter
        own.add(held.untyped_storage().data_ptr())
    chunks = engine.sharded_state()
    inside = all(c.tensor.untyped_storage().data_ptr() in own for c in chunks)
    return inside, sum(c.tensor.numel() for c in chunks)


@pytest.mark.parametrize("stage", [2, 3])
def test_saving_gathers_nothing(pool, stage):
    """Rectangles are views, and at stage 3 each rank has half of everything."""
    answers = pool(2, where_the_state_lies, work.run_config(MODEL, **zero(stage)))
    assert all(inside for inside, _ in answers)
    if stage == 3:
        first, second = (size for _, size in answers)
        assert first == pytest.approx(second, rel=0.02)


def shares_of_weights(config):
    """The weights that this rank saves: of so small a model one replica would save all."""
    engine, _ = work.make_engine(config)
    alone = sum(is_weight(part.name) for part in engine.sharded_state())
    model.SHARE_BYTES = 1 << 10
    try:
        return alone, [part for part in engine.sharded_state() if is_weight(part.name)]
    finally:
        model.SHARE_BYTES = 256 << 20


@pytest.mark.parametrize("name", ["megatron-dp2", "zero2-dp2"])
def test_replicas_share_the_weights_of_a_large_model(pool, name):
    """One of 512 replicas of a 7B model would write 7 GB, and each other one 80 MB."""
    ranks, changes = RUNS[name]
    (alone, first), (none, second) = pool(
        ranks, shares_of_weights, work.run_config(MODEL, **changes)
    )
    assert alone and not none
    sizes = [sum(part.tensor.numel() for part in share) for share in (first, second)]
    whole = work.assemble([first, second])  # each element once
    assert sum(sizes) == sum(tensor.numel() for tensor in whole.values())
    assert max(sizes) < 0.6 * sum(sizes)
