"""Spikes and other rejected steps in whole runs: alike on all ranks, exact on a resume."""

import errno
import json
import math
import os
from unittest import mock

import pytest
import torch

from pretrain.checkpoint import find_latest, read_manifest
from pretrain.commands.run import train as train_command
from pretrain.config import config_from_dict
from pretrain.engines.megatron import MegatronEngine
from pretrain.guard.divergence import DivergedError
from pretrain.watching.metrics import read_metrics
from tests.dist.training_runs import tiny_run

pytestmark = pytest.mark.dist

SPIKE = 8


def run_of(folder, shards, **changes):
    """A run whose loss hardly moves, so that a factor of 3 is a spike."""
    spikes = {"policy": "skip", "window": 4}
    usual = {"run__steps": 12, "optimizer__lr": 1e-5, "guard__spikes": spikes}
    usual["checkpoint__asynchronous"] = False  # a message names the last checkpoint
    usual |= {"schedule__name": "constant", "evaluation__interval": 100, "checkpoint__keep": 1}
    return tiny_run(folder, shards, **(usual | changes))


def train(raw, factors):
    """Exit code or message; `factors`: by step from 1, what the loss is multiplied by."""
    original, first = MegatronEngine.forward_backward, []

    def forward_backward(engine, batches):
        first.append(None)
        step = start + len(first)
        return original(engine, batches) * torch.tensor([factors.get(step, 1.0), 1.0])

    latest = find_latest(raw["run"]["dir"])
    start = 0 if latest is None else read_manifest(latest).step
    with mock.patch.object(MegatronEngine, "forward_backward", forward_backward):
        try:
            return train_command.main(config_from_dict(raw))
        except DivergedError as error:
            return str(error)


def losses(folder):
    return {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r}


def test_a_spike_is_skipped_on_all_ranks_and_the_same_after_a_resume(pool, shards, tmp_path):
    """The window lies in the checkpoint: stopped two steps before the spike, at another layout."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    factors = {SPIKE: 3.0}
    assert pool(2, train, run_of(whole, shards), factors) == [0, 0]
    short = run_of(cut, shards, run__steps=SPIKE - 2)
    assert pool(1, train, short, factors) == [0]
    assert pool(2, train, run_of(cut, shards), factors) == [0, 0]
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
    states = [read_manifest(find_latest(folder)).state for folder in (whole, cut)]
    for state in states:
        assert (state["step"], state["updates"]) == (12, 11)
        divergence = state["divergence"]
        assert (divergence["onset"], divergence["skipped"]) == (SPIKE, 0)
        assert len(divergence["losses"]) == 4
        assert max(divergence["losses"]) < 1.1 * min(divergence["losses"]), "the spike is not in it"

    # Retention keeps one checkpoint from before the spike beside the newest.
    kept = sorted(path.name[:13] for path in (whole / "checkpoints").glob("step-*"))
    assert kept == ["step-00000006", "step-00000012"]

    # So does a life that begins after the spike.
    assert pool(1, train, run_of(cut, shards, run__steps=14), {}) == [0]
    kept = sorted(path.name[:13] for path in (cut / "checkpoints").glob("step-*"))
    assert kept == ["step-00000006", "step-00000014"]

    (file,) = (whole / "evidence").iterdir()
    evidence = json.loads(file.read_text())
    assert file.name == "step-00000008-life-000001.json"
    batches = evidence["micro_batches"]
    assert [(b["replica"], b["samples"]) for b in batches] == [(0, [28, 30]), (1, [30, 32])]
    mean = sum(b["loss"] * b["tokens"] for b in batches) / sum(b["tokens"] for b in batches)
    assert mean * 3 == pytest.approx(losses(whole)[SPIKE])
    assert float(evidence["limits"]["max_loss"]) < losses(whole)[SPIKE]


def test_a_spike_stops_the_run_where_that_is_asked_for(pool, shards, tmp_path):
    raw = run_of(tmp_path, shards, guard__spikes={"policy": "stop", "window": 4})
    for message in pool(2, train, raw, {SPIKE: 3.0}):
        assert message.startswith("step 8: loss ")
        assert "a spike (limits: loss " in message and "guard.spikes.policy=stop" in message
        assert "step-00000006" in message and "evidence/ in" in message
        assert message.endswith(f"rewind {tmp_path} --to 6 --skip-samples 8"), "steps 7 and 8"
    assert read_manifest(find_latest(tmp_path)).step == 6


def train_without_room_for_evidence(raw, factors):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "evidence")
    with mock.patch("pretrain.guard.divergence.write_atomic", side_effect=full):
        return train(raw, factors)


def test_a_full_disk_takes_no_evidence_and_the_run_goes_on(pool, shards, tmp_path):
    raw = run_of(tmp_path, shards)
    assert pool(2, train_without_room_for_evidence, raw, {SPIKE: 3.0}) == [0, 0]
    assert read_manifest(find_latest(tmp_path)).state["updates"] == 11
    assert not (tmp_path / "evidence").exists()
    printed = (tmp_path / "logs" / "life-000001" / "rank_0.log").read_text()
    assert "the samples of step 8 are not recorded: [Errno 28] No space left on device" in printed


def test_a_full_disk_does_not_hide_why_a_run_stops(pool, shards, tmp_path):
    raw = run_of(tmp_path, shards, guard__spikes={"policy": "stop", "window": 4})
    main, other = pool(2, train_without_room_for_evidence, raw, {SPIKE: 3.0})
    assert main.startswith("step 8: loss ") and "guard.spikes.policy=stop" in main
    assert "evidence/" not in main and "evidence/" in other, "rank 0 alone writes, and prints"


def test_a_run_that_skips_every_step_stops(pool, shards, tmp_path):
    raw = run_of(tmp_path, shards, guard__stop_on_nonfinite=False, guard__max_skipped=3)
    factors = dict.fromkeys(range(3, 13), math.nan)
    (message,) = pool(1, train, raw, factors)
    assert "step 5: loss nan" in message and "guard.max_skipped=3 steps in a row" in message
    newest = read_manifest(find_latest(tmp_path))
    assert newest.step == 4 and newest.state["loss"] is None
    steps = {path.name[:13] for path in (tmp_path / "checkpoints").glob("step-*")}
    assert "step-00000002" in steps, "the last one with a finite loss stays, whatever keep says"
