"""Limits of a step by the steps before it, and what stops a run."""

import math
from pathlib import Path

import pytest

from pretrain.config import load_config
from pretrain.engines.verdict import FINITE, StepResult
from pretrain.guard.divergence import Divergence, RejectedStep, diverged
from tests.pretrain.run_files import config, message, raw


def result(loss, norm=1.0, accepted=True):
    finite = math.isfinite(loss) and math.isfinite(norm)
    return StepResult(loss, 8, norm, accepted and finite, finite)


def made(saved=None, **spikes):
    return Divergence(config(guard__spikes={"policy": "skip", "window": 5, **spikes}), saved)


def fed(divergence, *values):
    for step, value in enumerate(values, 1):
        divergence.note(step, result(value))
    return divergence


def test_nothing_is_judged_before_the_window_is_full_or_when_it_is_off():
    assert fed(made(), 3.0, 3.0, 3.0, 3.0).limits() is FINITE
    assert fed(made(policy="off"), *[3.0] * 9).limits() is FINITE
    assert fed(made(), *[3.0] * 5).limits().max_loss < 4.0


def test_the_limit_is_a_robust_z_score():
    """Median 3, median distance 0.1; one wild value among the five moves neither."""
    limits = fed(made(z_loss=10, z_norm=20), 3.0, 3.1, 2.9, 3.2, 50.0).limits()
    assert limits.max_loss == pytest.approx(3.1 + 10 * 1.4826 * 0.1)
    assert limits.max_grad_norm == pytest.approx(1.0 + 20 * 0.01), "a hundredth of the median"


def test_rejected_steps_are_not_in_the_window():
    divergence = fed(made(), *[3.0] * 5)
    before = divergence.limits()
    divergence.note(6, result(9.0, accepted=False))
    assert divergence.limits() == before


def test_what_is_saved_judges_as_if_nothing_had_stopped():
    divergence = fed(made(), 3.0, 3.1, 2.9, 3.2, 3.0, 2.8)
    divergence.note(7, result(9.0, accepted=False))
    again = made(divergence.to_dict())
    assert again.limits() == divergence.limits() and again.onset == 7
    assert again.to_dict() == divergence.to_dict()


def test_spikes_within_a_window_are_one_episode():
    divergence = made()
    for step in (7, 9, 12):
        divergence.note(step, result(9.0, accepted=False))
        assert divergence.onset == 7
    divergence.note(18, result(9.0, accepted=False))
    assert divergence.onset == 18


def test_what_stops_a_run():
    spike, nan = result(9.0, accepted=False), result(math.nan)
    assert made().must_stop(spike) is None
    assert made(policy="stop").must_stop(spike) == "guard.spikes.policy=stop"
    assert made().must_stop(nan) == "guard.stop_on_nonfinite=true"
    tolerant = Divergence(config(guard__stop_on_nonfinite=False, guard__max_skipped=2))
    for step, stops in ((1, False), (2, True)):
        tolerant.note(step, nan)
        assert (tolerant.must_stop(nan) is not None) is stops
    tolerant.note(3, result(3.0))
    tolerant.note(4, nan)
    assert tolerant.must_stop(nan) is None, "in a row"


def test_a_run_without_a_checkpoint_is_not_told_to_go_back_to_one():
    rejected = RejectedStep(2, result(math.nan), FINITE, 1e-3, 4)
    said = [diverged(config(), rejected, "KEY", good) for good in (None, Path("step-00000001-ab"))]
    assert said[0].endswith(f"lower optimizer.lr={config().optimizer.lr}")
    assert "--to 1 --skip-samples 16" in said[1]
    assert "step 2: loss nan, gradient norm 1: not finite" in said[0]


def test_the_section_in_a_section_is_read_from_file_and_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    from pretrain.config import config_from_dict, save_config

    save_config(config_from_dict(raw(guard__spikes={"policy": False})), path)
    assert load_config(path).guard.spikes.policy == "off", "YAML reads a bare off as false"
    spikes = load_config(path, ["--guard.spikes", "{policy: stop, window: 9}"]).guard.spikes
    assert (spikes.policy, spikes.window, spikes.z_loss) == ("stop", 9, 10.0)
    assert "guard.spikes.policy='never' must be 'off', 'skip' or 'stop'" in message(
        guard__spikes={"policy": "never"}
    )
    assert "guard.spikes has no size; its keys are policy, window, z_loss, z_norm" in message(
        guard__spikes={"size": 3}
    )


def test_a_learning_rate_that_overflows_is_a_message():
    assert "optimizer.lr=1e+38 must be less than or equal to 1e+30" in message(optimizer__lr=1e38)
    assert "optimizer.weight_decay" in message(optimizer__weight_decay=1e38)
