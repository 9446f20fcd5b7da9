"""A bit that flips on one rank is found, with the rank and the tensor."""

from unittest import mock

import pytest
import torch

import pretrain.commands.run.train
from pretrain.checkpoint import find_latest, read_manifest
from pretrain.config import config_from_dict
from pretrain.engines.megatron import MegatronEngine
from pretrain.guard.replicas import ReplicaWatcher, bit_hash, check_replicas, check_twice
from pretrain.trainer import train_step
from pretrain.watching.watcher import WatchedStep
from tests.dist import work
from tests.dist.needs import needs_deepspeed
from tests.dist.training_runs import tiny_run
from xlstm_io.errors import MachineFailed
from xlstm_mcore import hardware

pytestmark = pytest.mark.dist

TP2 = {"layout__tensor": 2}
ZERO = {"engine__name": "deepspeed"}


def flip(tensor):
    """Change the lowest bit of one element."""
    bits = tensor.detach().view(-1).view(torch.int32 if tensor.element_size() == 4 else torch.int16)
    bits[bits.numel() // 2] ^= 1


def train_with_a_flip(raw, at):
    """A run in which a bit flips on the last rank after a step; exit code or message."""
    original, steps = MegatronEngine.step, []

    def step(engine, lr, verdict):
        original(engine, lr, verdict)
        steps.append(None)
        if len(steps) == at and engine.layout.rank == engine.layout.world_size - 1:
            flip(next(engine.models[0].parameters()))

    with mock.patch.object(MegatronEngine, "step", step):
        try:
            return pretrain.commands.run.train.main(config_from_dict(raw))
        except MachineFailed as error:
            return str(error)


def test_a_run_stops_before_it_saves_the_damage(pool, shards, tmp_path):
    # fp32 weights are gathered from the partitions after every step, so the flip is checked there.
    raw = tiny_run(tmp_path, shards, run__steps=6, guard__check_replicas=2)
    for said in pool(2, train_with_a_flip, raw, 4):
        assert "embedding" in said and "they were the same at step 2" in said
    assert read_manifest(find_latest(tmp_path)).step == 2


def train_and_flip(config, flips):
    """What is said after two steps, and after each flip on the last rank was made and undone."""
    engine, layout = work.make_engine(config)
    work.train_steps(engine, layout, config, 0, 2)

    def said():
        try:
            check_replicas(engine, layout, since=0)
        except MachineFailed as error:
            return str(error)
        return ""

    answers = [said()]
    for name in flips:
        (tensor,) = (held.tensor for held in engine.held() if held.name == name)
        if layout.rank == layout.world_size - 1:
            flip(tensor)
        answers.append(said())
        if layout.rank == layout.world_size - 1:
            flip(tensor)
    return [*answers, said()]


def compute_twice(config, wrong, deterministic, makes=("same", "same")):
    """What is said when the last rank computes wrongly in some of its forward passes.

    The first one's device is of the first of two makes, all others' of the second.
    """
    engine, layout = work.make_engine(config)
    batch = work.random_batches(config, 0)[layout.dp_rank]
    passes = []

    def spoil(module, inputs, output):
        passes.append(None)
        last = layout.rank == layout.world_size - 1
        return output * (1 + 2**-20) if last and len(passes) in wrong else None

    engine.models[-1].decoder.layers[-1].register_forward_hook(spoil)
    make = makes[bool(layout.rank)]
    try:
        with mock.patch.object(hardware, "device_name", lambda: make):
            return check_twice(engine, layout, batch, 0, deterministic=deterministic)
    except MachineFailed as error:
        return str(error)


ALWAYS, ONCE = (1, 2, 3), (2,)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        pytest.param(2, {}, id="dp2"),
        pytest.param(4, {**TP2}, id="dp2-tp2"),
        pytest.param(4, {"layout__pipeline": 2, "layout__virtual": 1}, id="dp2-pp2"),
        pytest.param(2, {**ZERO, "engine__zero_stage": 3}, id="ds3", marks=needs_deepspeed),
    ],
)
def test_a_wrong_computation_is_found(pool, ranks, changes):
    config = work.run_config("large", **changes)
    assert pool(ranks, compute_twice, config, (), True) == [[]] * ranks
    last, before = ranks - 1, {2: 0, 4: 1 if changes.get("layout__tensor") else 2}[ranks]
    for said in pool(ranks, compute_twice, config, ALWAYS, False):
        assert f"rank {before} and rank {last} compute the same micro-batch differently" in said
    for said in pool(ranks, compute_twice, config, ONCE, True):
        assert f"rank {last} computes the same micro-batch in two ways" in said
    for (said,) in pool(ranks, compute_twice, config, ONCE, False):
        assert f"rank {last} computes the same micro-batch in two ways: a device is faulty" in said
    if not changes:  # devices of different makes round differently
        assert pool(2, compute_twice, config, ALWAYS, True, ("one", "other")) == [[]] * 2


def differing_gradient(config, name):
    """What is said when the last rank's gradient of a parameter differs before the update."""
    engine, layout = work.make_engine(config)
    watcher = ReplicaWatcher(config, layout, engine)
    batches = work.random_batches(config, 0)[layout.dp_rank :: layout.dp_size]
    original = type(engine).held_gradients

    def held_gradients(engine):
        for held in original(engine):
            if held.name == f"gradient of {name}" and layout.rank == layout.world_size - 1:
                flip(held.tensor)
            yield held

    with mock.patch.object(type(engine), "held_gradients", held_gradients):
        watcher.due(1)
        train_step(engine, batches, 1e-2, watchers=[watcher])
    try:
        watcher.tell(WatchedStep(1, batches, 0.0), mock.Mock())
    except MachineFailed as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(TP2, id="tp2"),
        pytest.param({**TP2, "layout__sequence": True}, id="tp2-sp"),
        pytest.param({**TP2, **ZERO, "engine__zero_stage": 2}, id="ds2", marks=needs_deepspeed),
    ],
)
def test_a_gradient_that_differs_between_tensor_ranks_is_found(pool, changes):
    config = work.run_config("large", guard__check_replicas=1, **changes)
    assert pool(2, differing_gradient, config, "nothing") == [""] * 2
    for said in pool(2, differing_gradient, config, NORM):
        assert f"gradient of {NORM} between tensor-parallel ranks: rank 0, 1 of 0, 1" in said


WEIGHT, NORM = "decoder.layers.0.mixer.q_proj.weight", "decoder.layers.1.mixer_norm.weight"
MOMENT = f"optimizer.state.exp_avg.{NORM}"


@pytest.mark.parametrize(
    ("ranks", "changes", "flips"),
    [
        pytest.param(2, {}, [WEIGHT, NORM], id="dp2"),
        pytest.param(2, {"optimizer__name": "muon"}, [WEIGHT, NORM], id="muon"),
        pytest.param(2, TP2, [NORM, MOMENT], id="tp2"),
        pytest.param(2, {**TP2, "layout__sequence": True}, [NORM, MOMENT], id="tp2-sp"),
        pytest.param(3, {"data__global_batch": 3}, [WEIGHT], id="dp3"),
        pytest.param(2, {**ZERO, "engine__zero_stage": 1}, [NORM], id="ds1", marks=needs_deepspeed),
    ],
)
def test_a_flipped_bit_is_found(pool, ranks, changes, flips):
    answers = pool(ranks, train_and_flip, work.run_config("large", **changes), flips)
    assert all(answer == answers[0] for answer in answers), "the same on every rank"
    before, *found, after = answers[0]
    assert before == after == ""
    whose = "tensor-parallel ranks" if "layout__tensor" in changes else "data-parallel replicas"
    odd, everyone = ("2", "0, 1, 2") if ranks == 3 else ("0, 1", "0, 1")
    for name, text in zip(flips, found, strict=True):
        assert f"{name} between {whose}: rank {odd} of {everyone}" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_counts(dtype):
    tensor = torch.randn(37, dtype=dtype)
    whole, bits = bit_hash(tensor), tensor.view(torch.int32 if dtype.itemsize == 4 else torch.int16)
    for place in range(37):
        for bit in range(8 * dtype.itemsize - 1):
            bits[place] ^= 1 << bit
            assert bit_hash(tensor) != whole
            bits[place] ^= 1 << bit
    assert bit_hash(tensor) == whole
