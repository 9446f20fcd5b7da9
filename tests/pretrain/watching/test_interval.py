"""The record of an interval: its mean loss, equal after a resume, and what it counts."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from pretrain.config import RunConfig
from pretrain.engines.verdict import StepResult
from pretrain.resume import TrainState
from pretrain.watching.interval import Interval

CONFIG = RunConfig(
    run={"dir": "runs/x", "steps": 100},
    model={"pattern": "M", "hidden_size": 64, "num_heads": 2, "vocab_size": 64},
    data={"path": "shards", "seq_len": 32, "global_batch": 4, "micro_batch": 2},
)
LAYOUT = SimpleNamespace(world_size=1)


def result(loss, tokens=10, accepted=True):
    return StepResult(loss=loss, tokens=tokens, grad_norm=loss / 2, accepted=accepted)


def test_the_mean_of_one_step_is_its_loss_to_the_last_digit():
    for loss in (0.1, 1 / 3, 5.123456789012345):
        assert TrainState().after(result(loss, tokens=7), 1.0).interval_loss == loss


def test_the_loss_is_the_mean_by_tokens_over_applied_steps():
    state = TrainState()
    steps = (result(4.0, 10), result(float("nan"), 10, accepted=False), result(1.0, 30))
    for one in steps:
        state = state.after(one, 1.0)
    record = Interval(CONFIG, LAYOUT).take(state, steps[-1], lr=0.5)
    assert record["loss"] == pytest.approx((4.0 * 10 + 1.0 * 30) / 40)
    assert record["skipped"] == 1 and record["grad_norm"] == 0.5
    assert state.logged().interval_tokens == 0


def test_the_loss_of_a_source_is_the_mean_over_its_tokens_and_survives_a_resume():
    names, steps = ("web", "code"), [((30.0, 10), (4.0, 2)), ((2.0, 30), (0.0, 0))]
    state, resumed = TrainState(), TrainState()
    for sources in steps:
        one = replace(result(1.0), sources=sources)
        state = state.after(one, 1.0, names)
        saved = json.loads(json.dumps(asdict(resumed.after(one, 1.0, names))))
        resumed = TrainState.saved_in(SimpleNamespace(state=saved))
    rejected = replace(result(9.0, accepted=False), sources=((9.0, 1), (9.0, 1)))
    state = state.after(rejected, 1.0, names)
    assert {name: list(sums) for name, sums in state.interval_sources.items()} == dict(
        resumed.interval_sources
    )
    record = Interval(CONFIG, LAYOUT).take(state, one, lr=0.5)
    assert record["loss/web"] == 32.0 / 40 and record["loss/code"] == 4.0 / 2
    assert not state.logged().interval_sources


def test_a_source_without_a_token_is_left_out():
    one = replace(result(1.0), sources=((3.0, 2), (0.0, 0)))
    record = Interval(CONFIG, LAYOUT).take(TrainState().after(one, 1.0, ("a", "b")), one, lr=0.5)
    assert record["loss/a"] == 1.5 and "loss/b" not in record


def test_an_interval_without_an_update_shows_the_last_loss():
    one = result(float("inf"), accepted=False)
    record = Interval(CONFIG, LAYOUT).take(TrainState().after(one, 1.0), one, lr=0.5)
    assert record["loss"] == float("inf") and record["skipped"] == 1


def test_speed_waiting_and_time_left_are_those_of_the_interval():
    interval = Interval(CONFIG, LAYOUT)
    state = TrainState()
    for step in range(4):
        interval.add(step, seconds=2.0, data_wait=0.5)
        state = state.after(result(1.0), 2.0)
    record = interval.take(state, result(1.0), lr=0.5)
    assert record["tokens_per_second"] == 4 * 4 * 32 / 8.0
    assert record["step_seconds"] == 2.0 and record["data_wait_seconds"] == 0.5
    assert record["eta_seconds"] == 96 * 2.0
    assert 0 < record["memory_bytes"] <= 1.5 * record["peak_memory_bytes"]
    interval.add(4, seconds=1.0, data_wait=0.0)
    again = interval.take(state.after(result(1.0), 1.0), result(1.0), lr=0.5)
    assert again["tokens_per_second"] == 4 * 32 and again["step_seconds"] == 1.0


def test_a_checkpoint_of_the_first_version_has_no_interval():
    saved = SimpleNamespace(state={"step": 3, "updates": 3, "tokens": 9, "seconds": 1.5})
    assert TrainState.saved_in(saved) == TrainState(3, 3, 9, 1.5)
