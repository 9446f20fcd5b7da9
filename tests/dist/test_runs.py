"""Whole runs of two ranks: resumed, beside damage, on remote storage, after a change of data."""

import errno
import json
import os
import shutil
import signal
from unittest import mock

import pytest
import torch

import pretrain.commands.run.train
import pretrain.self_test.resume
from pretrain.checkpoint import Candidates, CheckpointError, find_latest
from pretrain.commands.after_run.show import show
from pretrain.config import config_from_dict
from pretrain.data import ValidLoader
from pretrain.engines.base import LossSum
from pretrain.engines.megatron import MegatronEngine
from pretrain.supervision.lease import Lease
from pretrain.watching.metrics import read_metrics
from tests import fake_object_store
from tests.dist.training_runs import tiny_run
from xlstm_mcore.convert import cli as convert
from xlstm_mcore.megatron import compat

pytestmark = pytest.mark.dist


def train(raw):
    """Exit code, or the message of the error."""
    fake_object_store.register()
    try:
        return pretrain.commands.run.train.main(config_from_dict(raw))
    except CheckpointError as error:
        return str(error)


def log(folder):
    records = read_metrics(folder / "metrics.jsonl")
    return {
        r["step"]: (r["loss"], r["grad_norm"], r["lr"], r["tokens"]) for r in records if "loss" in r
    }


def flip_a_bit(path):
    data = next(path.glob("data-*"))
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)


@pytest.fixture(scope="module")
def whole(pool, shards, tmp_path_factory):
    """The log of a run without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    assert pool(2, train, tiny_run(folder, shards)) == [0, 0]
    return log(folder)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(pool, shards, tmp_path, whole):
    first = tiny_run(tmp_path, shards)
    first["schedule"]["decay_steps"] = 22  # the same schedule for the shorter run
    last = tiny_run(tmp_path, shards)
    assert pool(2, train, first | {"run": first["run"] | {"steps": 13}}) == [0, 0]
    newest, older = Candidates(tmp_path)
    assert newest.name.startswith("step-00000013") and older.name.startswith("step-00000012")
    flip_a_bit(newest)
    assert pool(2, train, last) == [0, 0]
    assert log(tmp_path) == whole
    assert newest.exists(), "left for a person"


def test_a_damaged_checkpoint_of_the_step_that_a_life_goes_on_from_stays(pool, shards, tmp_path):
    """No later life began before its step, so it does not count as left behind."""
    raw = tiny_run(tmp_path, shards, run__steps=4)
    assert pool(1, train, raw) == [0]
    sound = find_latest(tmp_path)
    twin = shutil.copytree(sound, sound.with_name("step-00000004-zzzzzzzz"))
    flip_a_bit(twin)
    raw["run"]["steps"] = 10
    assert pool(1, train, raw) == [0]
    assert twin.exists() and not sound.exists()


def train_and_measure(raw, losses):
    """As `train`, with these validation losses in place of the measured ones."""
    told = iter(losses)

    def evaluate(engine, batches):
        list(batches)
        return LossSum(next(told), 1)

    with mock.patch.object(MegatronEngine, "evaluate", evaluate):
        return train(raw)


def test_the_best_and_every_nth_checkpoint_stay(pool, shards, tmp_path):
    keys = {"checkpoint__keep": 1, "checkpoint__keep_every": 5, "checkpoint__keep_best": 2}
    raw = tiny_run(tmp_path, shards, run__steps=12, evaluation__interval=2, **keys)
    losses = {2: 5.0, 4: 1.0, 6: 2.0, 8: 4.0, 10: 3.0, 12: 6.0}
    assert pool(1, train_and_measure, raw, list(losses.values())) == [0]
    kept = {int(path.name.split("-")[1]) for path in (tmp_path / "checkpoints").glob("step-*")}
    assert kept == {4, 6, 10, 12}


def stopped_in_an_evaluation(raw):
    """As `train`, with SIGTERM to rank 1 alone in its second batch of evaluation."""
    real, batches = ValidLoader.__iter__, []

    def iterate(self):
        for batch in real(self):
            batches.append(batch)
            if len(batches) == 2 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    ValidLoader.__iter__ = iterate
    try:
        return train(raw), len(batches)
    finally:
        ValidLoader.__iter__ = real


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}], ids=["data", "tensor"])
def test_a_stop_that_one_rank_hears_in_an_evaluation(pool, shards, tmp_path, layout):
    """All leave at the same batch, with a checkpoint, and the next life measures first."""
    raw = tiny_run(tmp_path, shards, run__steps=4, evaluation__interval=3)
    raw |= {"layout": layout, "evaluation": {"interval": 3, "max_batches": 3}}
    assert pool(2, stopped_in_an_evaluation, raw) == [(75, 2), (75, 2)]
    assert find_latest(tmp_path).name.startswith("step-00000003")
    assert pool(2, train, raw) == [0, 0]
    records = {r["step"]: r for r in read_metrics(tmp_path / "metrics.jsonl")}
    assert sorted(records) == [1, 2, 3, 4]
    assert {step for step, r in records.items() if "valid_loss" in r} == {3, 4}


def lines(whole, steps):
    """The log of a run without a stop that has lines at `steps` only: means since the last one."""
    found, last = {}, 0
    tokens = {0: 0} | {step: record[3] for step, record in whole.items()}
    for step in steps:
        parts = [(whole[s][0], tokens[s] - tokens[s - 1]) for s in range(last + 1, step + 1)]
        mean = sum(loss * weight for loss, weight in parts) / sum(weight for _, weight in parts)
        found[step], last = (pytest.approx(mean, rel=1e-14), *whole[step][1:]), step
    return found


def test_a_stop_between_two_lines_of_the_log(pool, shards, tmp_path, whole):
    raw = tiny_run(tmp_path, shards, logging__interval=5, checkpoint__asynchronous=False)
    raw["schedule"]["decay_steps"] = 22
    assert pool(2, train, raw | {"run": raw["run"] | {"steps": 8}}) == [0, 0]
    assert pool(2, train, raw) == [0, 0]
    assert log(tmp_path) == lines(whole, (1, 5, 8, 10, 15, 20, 24))


def test_a_checkpoint_between_two_lines_holds_the_mean_of_the_interval(
    pool, shards, tmp_path, whole
):
    raw = tiny_run(tmp_path, shards, logging__interval=5)
    raw["schedule"]["decay_steps"] = 22
    assert pool(2, train, raw | {"run": raw["run"] | {"steps": 13}}) == [0, 0]
    newest = next(iter(Candidates(tmp_path)))
    flip_a_bit(newest)  # so that the next life begins after step 12
    assert pool(2, train, raw) == [0, 0]
    assert log(tmp_path) == lines(whole, (1, 5, 10, 15, 20, 24))


@pytest.mark.parametrize("key", ["run", "checkpoint"])
def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(
    pool, shards, tmp_path, key
):
    """Not at the first save, which may be hours away."""
    (tmp_path / "file").write_text("")
    raw = tiny_run(tmp_path, shards)
    raw.setdefault(key, {})["dir"] = str(tmp_path / "file" / "x")
    answers = pool(2, train, raw)
    assert answers[0] == answers[1]
    what = "taking the lease of run.dir=" if key == "run" else "writing to "
    assert answers[0].startswith(f"{what}{tmp_path}/file/")
    assert "Not a directory" in answers[0] and f"use another {key}.dir" in answers[0]
    assert not (tmp_path / "metrics.jsonl").exists()


def train_without_a_sign(raw):
    """As `train`, where the sign of life cannot be written."""
    full = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "lease.json")
    with mock.patch.object(Lease, "_sign", side_effect=full):
        return train(raw)


def test_nobody_trains_without_the_lease(pool, shards, tmp_path):
    """What a life without a number saves would count as superseded."""
    raw = tiny_run(tmp_path, shards, run__steps=2)
    answers = pool(2, train_without_a_sign, raw)
    assert answers[0] == answers[1]
    assert answers[0].startswith(f"taking the lease of run.dir={tmp_path} failed on rank 0: [Errno")
    assert not (tmp_path / "checkpoints").exists()


def test_nothing_starts_anew_where_all_checkpoints_are_damaged(pool, shards, tmp_path):
    raw = tiny_run(tmp_path, shards, run__steps=4)
    assert pool(2, train, raw) == [0, 0]
    for path in Candidates(tmp_path):
        flip_a_bit(path)
    answers = pool(2, train, raw)
    assert answers[0] == answers[1] and "none of the 2 checkpoints" in answers[0]


def test_resume_from_one_process_of_an_object_store(pool, shards, tmp_path, whole):
    """Saved by two ranks without rename, continued by two, shown, exported, all by URL."""
    url = f"objects://{tmp_path}/bucket/run"
    raw = tiny_run(tmp_path / "run", shards, checkpoint__dir=url, checkpoint__interval=7)
    raw["schedule"]["decay_steps"] = 22
    assert pool(2, train, raw | {"run": raw["run"] | {"steps": 10}}) == [0, 0]
    assert pool(2, train, raw) == [0, 0]
    assert log(tmp_path / "run") == whole
    local = {
        "config.yaml",
        "history.jsonl",
        "starts",
        "lease.json",
        "lives",
        "logs",
        "metrics.jsonl",
        "progress.json",
    }
    assert set(os.listdir(tmp_path / "run")) == {*local, "summary.json"}
    fake_object_store.register()
    assert f"{url}/step-00000024" in show(url) and "written on  name=megatron" in show(url)
    assert pool(1, export, url, str(tmp_path / "hf")) == [0]
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size > 100_000


def export(url, folder):
    fake_object_store.register()
    return convert.main(["to-hf", url, folder])


def test_another_tokenizer_or_data_is_refused_unless_it_is_meant(pool, shards, tmp_path):
    raw = tiny_run(tmp_path / "run", shards, run__steps=4)
    assert pool(2, train, raw) == [0, 0]
    path = find_latest(tmp_path / "run")
    manifest = json.loads((path / "manifest.json").read_text())
    changed = tiny_run(tmp_path / "run", shards, run__steps=6, run__seed=2)
    changed["model"]["norm_eps"] = 1e-5
    text = pool(2, train, changed)[0]
    for words in (
        "model.norm_eps: checkpoint 1e-06, run 1e-05",
        "run.seed: checkpoint 1, run 2",
        "cursor.plan.seed: checkpoint 1, run 2",
        "checkpoint.accept_changes=run.seed,model.norm_eps,cursor.plan.seed",
    ):
        assert words in text, text
    assert json.loads((path / "manifest.json").read_text()) == manifest
    changed["checkpoint"]["accept_changes"] = "model.norm_eps, run, cursor.plan"
    assert pool(2, train, changed) == [0, 0]
    assert find_latest(tmp_path / "run").name.startswith("step-00000006")


def test_the_self_test_sends_nothing_anywhere(tmp_path):
    run = config_from_dict(tiny_run(tmp_path, tmp_path, logging__wandb={"project": "mine"}))
    part = pretrain.self_test.resume._part(run, "self-test-1", "straight")
    assert part.logging.wandb.project is None and not part.logging.tensorboard


def self_test(raw, steps):
    return pretrain.self_test.resume.main(config_from_dict(raw), steps)


def broken_self_test(raw, steps):
    """With a resume that goes wrong in its second step: one Adam step shared by all parameters."""
    original = compat.set_adam_step

    def share(optimizer, step):
        original(optimizer, step)
        shared = torch.tensor(float(step))
        for state in optimizer.state.values():
            state["step"] = shared

    compat.set_adam_step = share
    try:
        pretrain.self_test.resume.main(config_from_dict(raw), steps)
    except CheckpointError as error:
        return str(error)
    finally:
        compat.set_adam_step = original


def test_the_self_test_passes_and_leaves_nothing(pool, shards, tmp_path):
    url = f"objects://{tmp_path}/bucket/run"
    raw = tiny_run(tmp_path / "run", shards, checkpoint__dir=url)
    assert pool(2, registered_self_test, raw, 6) == [0, 0]
    assert list((tmp_path / "run").iterdir()) == []
    assert not any(p.is_file() for p in (tmp_path / "bucket").rglob("*"))


def registered_self_test(raw, steps):
    fake_object_store.register()
    return self_test(raw, steps)


def test_the_self_test_names_what_differs(pool, shards, tmp_path):
    answers = pool(2, broken_self_test, tiny_run(tmp_path / "run", shards), 6)
    assert answers[0] == answers[1]
    for words in ("step 5: loss", "tensors, such as", "run.deterministic=true"):
        assert words in answers[0], answers[0]
    assert "step 4: loss" not in answers[0]
