"""A run that was taken back equals one that never saw the samples that it leaves out."""

import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import pretrain.cli
import pretrain.commands.run.train
from pretrain.checkpoint import TensorSlice, find_latest, read_manifest, save_checkpoint
from pretrain.config import config_from_dict, save_config
from pretrain.data import DataPlan
from pretrain.watching.history import read_history
from pretrain.watching.metrics import read_metrics
from slurm.job.state import Policy, RunState
from tests.dist.training_runs import tiny_run
from xlstm_io.checkpoint import manifest as manifest_module
from xlstm_io.checkpoint.lives import Lives

pytestmark = pytest.mark.dist

TO, SKIP = 4, 6  # one batch and a half
FIRST = TO * 4


def run_of(folder, shards, steps):
    usual = {"schedule__name": "constant", "evaluation__interval": 100, "checkpoint__keep": 9}
    return tiny_run(folder, shards, run__steps=steps, **usual)


def train(raw):
    return pretrain.commands.run.train.main(config_from_dict(raw))


def train_without(raw):
    """The same run on data in which those samples do not exist."""
    locate = DataPlan.locate

    def without(plan, samples):
        samples = np.asarray(samples)
        return locate(plan, samples + SKIP * (samples >= FIRST))

    with mock.patch.object(DataPlan, "locate", without):
        return train(raw)


def log(folder):
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    return {r["step"]: (r["loss"], r["grad_norm"], r["tokens"]) for r in records}


def test_a_rewound_run_equals_one_that_never_saw_the_samples(pool, shards, tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    assert pool(2, train, run_of(run, shards, 8)) == [0, 0]
    assert pool(2, train_without, run_of(other, shards, 10)) == [0, 0]
    before = log(run)

    words = ["rewind", str(run), "--to", str(TO), "--skip-samples", str(SKIP)]
    assert pretrain.cli.run(words) == 0
    said = capsys.readouterr().out
    assert "step-00000004" in said and "without the samples 16 to 21" in said
    assert said.count("superseded, never loaded again") == 2

    # A life that ends before its first save leaves them out again in the next one.
    assert pool(2, train, run_of(run, shards, TO)) == [0, 0]
    # Stopped once more, and continued at another layout.
    assert pool(2, train, run_of(run, shards, 8)) == [0, 0]
    assert {step: log(run)[step] for step in range(1, 9)} == {s: log(other)[s] for s in range(1, 9)}
    assert log(run)[5] != before[5]
    assert pool(1, train, run_of(run, shards, 10)) == [0]
    for step in (9, 10):
        assert log(run)[step] == pytest.approx(log(other)[step], rel=1e-5)

    cursor = read_manifest(find_latest(run)).state["cursor"]
    assert cursor["skipped"] == [[FIRST, SKIP]]
    assert cursor["consumed_samples"] == 10 * 4 + SKIP
    events = [(line["event"], line["step"]) for line in read_history(run)]
    assert [one for one in events if one[0] in ("start", "rewind")] == [
        ("start", 0),
        ("rewind", 4),
        ("start", 4),
        ("start", 4),
        ("start", 8),
    ]
    assert [step for event, step in events if event == "done"][-1] == 10
    kept = read_metrics(run / "evidence" / "metrics-before-life-000002.jsonl")
    assert {r["step"] for r in kept} >= set(range(1, 9))

    # Back to the same step again, this time with all samples.
    assert pretrain.cli.run(["rewind", str(run), "--to", str(TO)]) == 0
    assert pool(2, train, run_of(run, shards, 8)) == [0, 0]
    assert log(run) == before
    assert pretrain.cli.run(["rewind", str(run), "--to", "5"]) == 2
    error = capsys.readouterr().err
    assert "no complete checkpoint of that step" in error and "2, 4, 6, 8" in error
    assert pretrain.cli.run(["rewind", str(tmp_path), "--to", "5"]) == 2


def test_a_finished_run_that_was_taken_back_can_go_on(tmp_path, capsys):
    """Its summary would keep Slurm's jobs from starting it again; nothing is deleted."""
    golden = Path(__file__).parents[1] / "data" / "golden" / "0.1.0"
    run = tmp_path / "run"
    shutil.copytree(golden / "run", run)
    summary = json.dumps({"steps": 6})
    (run / "summary.json").write_text(summary)
    files, policy = RunState(run), Policy(steps=6, checkpoints=str(run / "checkpoints"))
    assert files.finished(policy.steps)
    assert pretrain.cli.run(["rewind", str(run), "--to", "5"]) == 2  # no such checkpoint
    assert files.finished(policy.steps)
    assert pretrain.cli.run(["rewind", str(run), "--to", "3"]) == 0
    assert not files.finished(policy.steps) and files.newest_step(policy) == 3
    assert (run / "evidence" / "summary-before-life-000001.json").read_text() == summary


def test_only_the_checkpoint_of_the_step_is_looked_at_whole(tmp_path, capsys, monkeypatch):
    """A run of months has a hundred checkpoints, each with a file of every rank."""
    golden = Path(__file__).parents[1] / "data" / "golden" / "0.1.0"
    run = Path(shutil.copytree(golden / "run", tmp_path / "run"))
    slices = [TensorSlice("w", (2,), (0,), torch.zeros(2))]
    for step in (1, 2, 4, 5):
        beyond = save_checkpoint(run, slices, {"life": step}, {}, step=step)
    (beyond / "data-00000.safetensors").write_bytes(b"cut")
    looked, real = set(), manifest_module.check_sizes
    monkeypatch.setattr(
        manifest_module, "check_sizes", lambda path, *rest: looked.add(path) or real(path, *rest)
    )
    assert pretrain.cli.run(["rewind", str(run), "--to", "3"]) == 0
    assert {path.name[:13] for path in looked} == {"step-00000003"}
    assert f"yours to delete: {beyond}" in capsys.readouterr().out
    assert Lives(run / "checkpoints").superseded_by(5, 5) == 6


def test_a_branch_leaves_out_samples_after_the_checkpoint_that_it_was_copied_from(
    shards, tmp_path, capsys
):
    """That was written by a later life of its run than any of the branch."""
    tensor = torch.zeros(2)
    state = {"life": 12, "cursor": {"consumed_samples": FIRST}}
    slices = [TensorSlice("w", (2,), (0,), tensor)]
    saved = save_checkpoint(tmp_path / "run", slices, state, {}, step=TO)
    assert pretrain.cli.run(["copy", str(saved), str(tmp_path / "branch")]) == 0
    config = config_from_dict(run_of(tmp_path / "branch", shards, 8))
    save_config(config, tmp_path / "branch" / "config.yaml")
    words = ["rewind", str(tmp_path / "branch"), "--to", str(TO), "--skip-samples", str(SKIP)]
    assert pretrain.cli.run(words) == 0
    assert "without the samples 16 to 21" in capsys.readouterr().out
    assert Lives(tmp_path / "branch" / "checkpoints").samples_to_skip(12, TO) == SKIP
