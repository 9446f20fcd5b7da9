"""A cooldown branch equals the run that would have cooled down there."""

import sys

import pytest

import pretrain.cli
import pretrain.commands.run.train
from pretrain.checkpoint import find_latest, read_manifest
from pretrain.config import config_from_dict, load_config
from pretrain.watching.metrics import read_metrics
from tests.dist.training_runs import tiny_run

pytestmark = pytest.mark.dist


def run_of(folder, shards, **changes):
    usual = {"schedule__name": "wsd", "schedule__cooldown_steps": 2, "checkpoint__keep": 9}
    usual |= {"evaluation__interval": 100}
    return tiny_run(folder, shards, **{**usual, **changes})


def train(raw):
    return pretrain.commands.run.train.main(config_from_dict(raw))


def log(folder):
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    return {r["step"]: (r["lr"], r["loss"], r["grad_norm"], r["tokens"]) for r in records}


def test_a_branch_equals_a_run_that_cools_down_there(pool, shards, tmp_path, capsys):
    run, branch, whole = tmp_path / "run", tmp_path / "branch", tmp_path / "whole"
    (tmp_path / "tell.py").write_text(
        "import sys; open(sys.argv[1], 'a').write(sys.stdin.read() + '\\n')"
    )
    heard = tmp_path / "heard.jsonl"
    event = f"{sys.executable} {tmp_path / 'tell.py'} {heard}"
    assert pool(1, train, run_of(run, shards, run__steps=12, run__on_event=event)) == [0]
    assert heard.read_text().count('"event": "done"') == 1
    words = ["cooldown", str(run), "--checkpoint", "6", "--steps", "4", "--out", str(branch)]
    assert pretrain.cli.run([*words, "--shape", "1-sqrt"]) == 0
    assert f"python -m pretrain launch {branch}/run.yaml" in capsys.readouterr().out
    config = load_config(branch / "run.yaml")
    assert (config.run.steps, config.schedule.cooldown_steps) == (10, 4)
    assert pool(1, train, config.model_dump(mode="json")) == [0]
    changes = {"schedule__cooldown_steps": 4, "schedule__cooldown_shape": "1-sqrt"}
    assert pool(1, train, run_of(whole, shards, run__steps=10, **changes)) == [0]
    cooled, expected = log(branch), log(whole)
    assert cooled == {step: expected[step] for step in (7, 8, 9, 10)}
    assert cooled[10][0] < cooled[7][0]
    ends = [read_manifest(find_latest(folder)) for folder in (branch, whole)]
    assert (
        ends[0].state["cursor"]["consumed_samples"] == ends[1].state["cursor"]["consumed_samples"]
    )
    # Refused: the folder is in use, and a cosine has no stable phase.
    assert pretrain.cli.run(words) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert pretrain.cli.run(["cooldown", str(branch), "--steps", "4", "--out", str(run / "x")]) == 2
    assert "outside the stable phase" in capsys.readouterr().err
