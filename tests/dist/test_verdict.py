"""A step that is judged bad changes nothing, on any engine, and a step reads the device once."""

import math
import traceback
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain.commands.run.train
from pretrain import layout as layouts
from pretrain.checkpoint import find_latest, read_manifest
from pretrain.config import config_from_dict
from pretrain.engines import adamw, muon
from pretrain.engines.megatron import MegatronEngine
from pretrain.engines.verdict import Guard
from pretrain.guard.divergence import DivergedError
from pretrain.trainer import train_step
from tests.dist import work
from tests.dist.needs import needs_deepspeed
from tests.dist.training_runs import tiny_run

pytestmark = pytest.mark.dist

MODEL = "mixed"
MUON = {"optimizer__name": "muon"}
ZERO = {"engine__name": "deepspeed"}
BF16 = {"engine__precision": "bf16"}
NAN, INF = math.nan, math.inf


def masked(function, *args):
    """Call a function with optimizers that mask their update on the device, as on a GPU."""
    accelerator = torch.device("meta")  # anything but the CPU

    def mask(adam, device, of=adamw.mask_on_device):
        return of(adam, accelerator)

    with (
        mock.patch.object(adamw, "mask_on_device", mask),
        mock.patch.object(muon, "mask_on_device", mask),
    ):
        return function(*args)


def masked_train(config, steps):
    return masked(work.train, config, steps)


def bad_step(engine, layout, config, loss, gradient):
    """A step whose loss and gradient are multiplied by factors, on the last rank only."""
    last = layout.rank == layout.world_size - 1
    parameter = next(engine.models[-1].parameters())
    handle = parameter.register_hook(lambda value: value * (gradient if last else 1.0))
    factors = torch.tensor([loss if last else 1.0, 1.0])  # of the losses' sum and the tokens
    original = engine.forward_backward
    engine.forward_backward = lambda batches: original(batches) * factors
    try:
        batches = work.random_batches(config, 7)[layout.dp_rank :: layout.dp_size]
        return train_step(engine, batches, config.optimizer.lr)
    finally:
        handle.remove()
        del engine.forward_backward


def copies(engine):
    return [(part.name, part.tensor.detach().clone()) for part in engine.sharded_state()]


def train_around_bad_steps(config):
    """Two steps with three bad ones between them.

    Returns:
        Whether each bad step was accepted, whether each left the state as it was, losses and norms
        of the good steps, and the state after them.
    """
    engine, layout = work.make_engine(config)
    steps = work.train_steps(engine, layout, config, 0, 1)
    before = copies(engine)
    accepted, same = [], []
    for loss, gradient in ((NAN, 1.0), (1.0, NAN), (1.0, INF)):
        accepted.append(bad_step(engine, layout, config, loss, gradient).accepted)
        after = copies(engine)
        same.append(all(torch.equal(a, b) for (_, a), (_, b) in zip(before, after, strict=True)))
    steps += work.train_steps(engine, layout, config, 1, 2)
    return accepted, same, steps, copies(engine)


def masked_train_around_bad_steps(config):
    return masked(train_around_bad_steps, config)


@pytest.mark.parametrize(
    ("train", "around", "changes"),
    [
        pytest.param(work.train, train_around_bad_steps, {}, id="adamw"),
        pytest.param(work.train, train_around_bad_steps, BF16, id="adamw-bf16"),
        pytest.param(work.train, train_around_bad_steps, MUON, id="muon"),
        pytest.param(masked_train, masked_train_around_bad_steps, {}, id="masked-adamw"),
        pytest.param(masked_train, masked_train_around_bad_steps, BF16, id="masked-adamw-bf16"),
        pytest.param(masked_train, masked_train_around_bad_steps, MUON, id="masked-muon"),
        *(
            pytest.param(
                work.train,
                train_around_bad_steps,
                {**ZERO, **changes},
                id="deepspeed-" + "-".join(map(str, changes.values())),
                marks=needs_deepspeed,
            )
            for changes in (
                {"engine__zero_stage": 1},
                {"engine__zero_stage": 1, "layout__pipeline": 2},
                {"engine__zero_stage": 1, **BF16},
                {"engine__zero_stage": 2, "engine__offload": "optimizer"},
                {"engine__zero_stage": 2},
                {"engine__zero_stage": 2, **BF16},
                {"engine__zero_stage": 3},
            )
        ),
    ],
)
def test_a_bad_step_on_one_rank_changes_nothing_on_any(pool, train, around, changes):
    """Not weights, masters, moments or Adam's count of updates, which later steps depend on."""
    config = work.run_config(MODEL, **changes)
    clean = pool(2, train, config, 2)
    for (accepted, same, steps, state), (expected, slices) in zip(
        pool(2, around, config), clean, strict=True
    ):
        assert accepted == [False] * 3
        assert same == [True] * 3
        assert steps == expected
        for (name, got), part in zip(state, slices, strict=True):
            assert torch.equal(got, part.tensor), name


def judge(losses, norms, guard, votes):
    """A guard's verdict on this rank's numbers."""
    layout = layouts.start(work.run_config(MODEL))
    loss = torch.tensor([losses[layout.rank], 2.0], dtype=torch.float64)
    return guard.judge(loss, torch.tensor(norms[layout.rank]), votes[layout.rank]).read()


@pytest.mark.parametrize(
    ("losses", "norms", "guard", "accepted"),
    [
        ((8.0, 8.0), (1.5, 1.5), Guard(), True),
        ((8.0, 8.0), (1.5, 1.5), Guard(max_loss=4.0, max_grad_norm=1.5), True),
        ((8.0, 8.0), (1.5, 1.5), Guard(max_loss=3.9), False),
        ((8.0, 8.0), (1.5, 1.5), Guard(max_grad_norm=1.4), False),
        ((8.0, NAN), (1.5, 1.5), Guard(), False),
        ((8.0, 8.0), (INF, 1.5), Guard(), False),
        ((-INF, -INF), (1.5, 1.5), Guard(), False),
    ],
)
def test_all_ranks_come_to_one_verdict(pool, losses, norms, guard, accepted):
    votes = ((False, True, False), (False, False, True))
    for rank, result in enumerate(pool(2, judge, losses, norms, guard, votes)):
        assert result.accepted is accepted
        assert result.finite is all(map(math.isfinite, (*losses, *norms)))
        assert result.votes == (False, True, True)
        assert result.tokens == 2
        assert result.grad_norm == norms[rank]
        assert result.loss == pytest.approx(losses[rank] / 2, nan_ok=True)


def train_with_a_bad_loss(raw, bad_step):
    """Exit code or message of a run whose loss is NaN in one step."""
    original = MegatronEngine.forward_backward
    steps = 0

    def forward_backward(engine, batches):
        nonlocal steps
        steps += 1
        return original(engine, batches) * torch.tensor([NAN if steps == bad_step else 1.0, 1.0])

    with mock.patch.object(MegatronEngine, "forward_backward", forward_backward):
        try:
            return pretrain.commands.run.train.main(config_from_dict(raw))
        except DivergedError as error:
            return str(error)


def test_a_run_that_goes_on_counts_a_bad_step_but_no_update(pool, shards, tmp_path):
    raw = tiny_run(tmp_path, shards, run__steps=4, guard__stop_on_nonfinite=False)
    assert pool(2, train_with_a_bad_loss, raw, 2) == [0, 0]
    state = read_manifest(find_latest(tmp_path)).state
    assert (state["step"], state["updates"]) == (4, 3)


def test_a_run_that_stops_keeps_the_checkpoint_from_before(pool, shards, tmp_path):
    raw = tiny_run(tmp_path, shards, run__steps=4, checkpoint__asynchronous=False)
    for message in pool(2, train_with_a_bad_loss, raw, 4):
        assert message.startswith("step 4: loss nan, gradient norm ")
        assert "so the update was not applied and the run stops" in message
        assert "step-00000002" in message
    assert read_manifest(find_latest(tmp_path)).step == 2


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value on the host: item, float, bool, tolist.

    torch's plain AdamW keeps its count of updates in tensors that lie on the host, whatever the
    device of the weights, and the documents of a batch are known from the loader's own tensors;
    reading those is left out.
    """

    def __init__(self):
        super().__init__()
        self.places = []

    def _note(self):
        frames = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_stack()[:-2]]
        on_host = ("torch/optim/adam", " know_documents")
        if not any(name in frame for frame in frames for name in on_host):
            # A mark of torch that first_import.py has replaced stands between torch and its caller.
            between = ("/torch/", "/first_import.py")
            self.places.append(
                next(f for f in reversed(frames) if not any(name in f for name in between))
            )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self._note()
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        original = torch.Tensor.tolist

        def tolist(tensor):
            self._note()
            return original(tensor)

        self._patch = mock.patch.object(torch.Tensor, "tolist", tolist)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *exc_info):
        super().__exit__(*exc_info)
        self._patch.stop()


def host_reads(config):
    """Where the second step of a run reads the device."""
    engine, layout = work.make_engine(config)
    work.train_steps(engine, layout, config, 0, 1)
    with HostReads() as reads:
        work.train_steps(engine, layout, config, 1, 2)
    return reads.places


def masked_host_reads(config):
    return masked(host_reads, config)


@pytest.mark.parametrize("count", [host_reads, masked_host_reads], ids=["judged", "masked"])
@pytest.mark.parametrize(
    "changes",
    [{}, BF16, MUON, {"layout__pipeline": 2}, {"engine__overlap_grad_reduce": True}],
    ids=lambda changes: "-".join(map(str, changes.values())) or "adamw",
)
def test_a_step_of_megatrons_engine_reads_the_device_once(pool, count, changes):
    for places in pool(2, count, work.run_config(MODEL, **changes)):
        assert len(places) == 1, places


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_of_deepspeeds_engine_reads_once_what_is_ours(pool, stage):
    """What DeepSpeed's own code reads is not counted."""
    for places in pool(2, host_reads, work.run_config(MODEL, **ZERO, engine__zero_stage=stage)):
        ours = [place for place in places if "/deepspeed/" not in place]
        assert len(ours) == 1, places
