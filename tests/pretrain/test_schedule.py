"""The learning rate at its corners."""

import math

import pytest

from pretrain.config import ConfigError, OptimizerConfig, ScheduleConfig
from pretrain.lr_curve import Curve, continued
from pretrain.lr_schedule import learning_rate
from xlstm_io.checkpoint.schema import State

PEAK, STEPS = 2.0, 100


def lr(step, **keys):
    schedule = ScheduleConfig(**{"warmup_steps": 10, **keys})
    return learning_rate(step, peak=PEAK, schedule=schedule, steps=STEPS)


NAMES = ["constant", "linear", "cosine", "exponential", "wsd"]
FLAT = ("constant", "wsd")


@pytest.mark.parametrize("name", NAMES)
def test_warmup_starts_above_zero_and_reaches_the_peak(name):
    assert lr(0, name=name) == pytest.approx(PEAK / 10)
    assert lr(9, name=name) == pytest.approx(PEAK)
    assert lr(10, name=name) == pytest.approx(PEAK)


@pytest.mark.parametrize("name", NAMES)
def test_no_warmup_starts_at_the_peak(name):
    assert lr(0, name=name, warmup_steps=0) == pytest.approx(PEAK)


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("constant", 1.0),
        ("wsd", 1.0),
        ("linear", 0.55),
        ("cosine", 0.55),
        ("exponential", math.sqrt(0.1)),
    ],
)
def test_half_way_and_end(name, half):
    assert lr(55, name=name) == pytest.approx(PEAK * half)
    assert lr(STEPS, name=name) == pytest.approx(PEAK * (1.0 if name in FLAT else 0.1))


def test_cosine_is_no_line():
    quarter = lr(10 + 90 // 4, name="cosine")
    assert quarter > lr(10 + 90 // 4, name="linear")


def test_after_decay_steps_cosine_rests_and_exponential_falls_on():
    assert lr(40, decay_steps=20) == pytest.approx(PEAK * 0.1)
    assert lr(50, name="linear", decay_steps=20) == pytest.approx(PEAK * 0.1)
    assert lr(50, name="exponential", decay_steps=20) == pytest.approx(PEAK * 0.01)


@pytest.mark.parametrize("name", NAMES)
def test_cooldown_is_linear_to_zero(name):
    before = lr(80, name=name, cooldown_steps=20)
    assert before == pytest.approx(PEAK * (1.0 if name in FLAT else 0.1))
    assert lr(90, name=name, cooldown_steps=20) == pytest.approx(before / 2)
    assert lr(99, name=name, cooldown_steps=20) == pytest.approx(before / 20)
    assert lr(100, name=name, cooldown_steps=20) == 0
    assert lr(150, name=name, cooldown_steps=20) == 0


@pytest.mark.parametrize(
    ("shape", "quarter", "half"),
    [
        ("linear", 0.75, 0.5),
        ("1-sqrt", 0.5, 1 - math.sqrt(0.5)),
        ("cosine", (1 + math.sqrt(0.5)) / 2, 0.5),
        ("exponential", None, None),
    ],
)
@pytest.mark.parametrize("floor", [0.0, 0.04])
def test_shapes_of_the_cooldown(shape, quarter, half, floor):
    """wsd: stable until the cooldown, then from the peak to the floor."""
    if shape == "exponential":
        floor = floor or 0.01
        quarter, half = ((floor**u - floor) / (1 - floor) for u in (0.25, 0.5))

    def at(step):
        keys = {"cooldown_steps": 40, "cooldown_shape": shape, "cooldown_min_lr_ratio": floor}
        return lr(step, name="wsd", **keys) / PEAK

    assert at(10) == at(59) == at(60) == pytest.approx(1)
    assert at(70) == pytest.approx(floor + (1 - floor) * quarter)
    assert at(80) == pytest.approx(floor + (1 - floor) * half)
    assert at(100) == pytest.approx(floor)
    assert at(120) == pytest.approx(floor)
    assert all(at(step) > at(step + 1) for step in range(60, 100))


def test_the_7b_schedule():
    """Warmup 3K, a tenth at 500K, further down to 543K, linear to 0 at 550K."""
    schedule = ScheduleConfig(
        name="exponential",
        warmup_steps=3000,
        decay_steps=497_000,
        cooldown_steps=7000,
        cooldown_shape="linear",
        cooldown_min_lr_ratio=0.0,
        min_lr_ratio=0.1,
    )
    at = Curve(550_000).rates(5e-4, schedule)
    assert at(2999) == pytest.approx(5e-4)
    assert at(500_000) == pytest.approx(5e-5)
    assert at(543_000) == pytest.approx(5e-4 * 0.1 ** (540 / 497))
    assert at(546_500) == pytest.approx(at(543_000) / 2)


def test_warmup_of_the_whole_run_with_cooldown_of_nothing():
    assert lr(99, warmup_steps=100) == pytest.approx(PEAK)
    assert lr(100, warmup_steps=100) > 0


def test_unknown_name_is_a_bug():
    unknown = ScheduleConfig().model_copy(update={"name": "sine"})
    with pytest.raises(AssertionError, match="sine"):
        learning_rate(20, peak=PEAK, schedule=unknown, steps=STEPS)


def extended(done, before, steps, curve=None, **keys):
    """The rate as a function of the step, before and after a change of the run's length."""
    schedule = ScheduleConfig(**{"warmup_steps": 10, **keys})
    old = curve or Curve(before)
    new, said = continued(
        old, OptimizerConfig(lr=PEAK), schedule, done=done, before=before, steps=steps
    )
    return new, old.rates(PEAK, schedule), new.rates(PEAK, schedule), said


def largest_jump(rate, steps):
    return max(abs(rate(step + 1) - rate(step)) for step in range(9, steps - 1))


@pytest.mark.parametrize("extend", ["stretch", "hold"])
@pytest.mark.parametrize("done", [0, 1, 60, 99, 100, 110])
@pytest.mark.parametrize("steps", [70, 100, 150])
def test_a_checkpoint_takes_every_curve(extend, done, steps):
    """At 100 of 100 steps what is left of the curve is nothing, after that less than nothing."""
    new, *_ = extended(done, 100, steps, extend=extend)
    assert Curve.from_dict(State(curve=new.to_dict()).model_dump()["curve"]) == new
    assert all(turn.pace >= 0 for turn in new.turns)


@pytest.mark.parametrize("extend", ["stretch", "hold"])
def test_a_finished_cosine_that_is_extended_stays_at_its_end(extend):
    _, old, new, said = extended(100, 100, 102, extend=extend)
    assert [new(step) for step in range(99)] == [old(step) for step in range(99)]
    assert new(100) == new(101) == pytest.approx(PEAK * 0.1)
    assert "its last rate is held" in said and f"schedule.extend={extend}" in said


def test_recompute_lets_the_rate_jump_as_the_new_curve_says():
    new, _, rate, said = extended(100, 100, 200, extend="recompute")
    assert new == Curve(200) and rate(100) == pytest.approx(PEAK * 0.55, rel=0.1)
    assert "0.201 in the last step, 1.17 in the next" in said


@pytest.mark.parametrize("name", ["linear", "cosine", "exponential"])
@pytest.mark.parametrize("steps", [70, 101, 150, 400])
def test_what_is_left_is_stretched_or_shrunk_without_a_jump(name, steps):
    _, old, new, said = extended(60, 100, steps, name=name)
    assert [new(step) for step in range(61)] == [old(step) for step in range(61)]
    assert new(steps) == pytest.approx(PEAK * 0.1)
    assert largest_jump(new, steps) <= largest_jump(old, 100) * max(1, 40 / (steps - 60)) * 1.01
    assert "stretched" in said


def test_a_curve_that_does_not_depend_on_the_length_so_far_is_used_as_it_is():
    """Stretching would make a cooldown of 20 steps longer than it is to be."""
    wsd = {"name": "wsd", "cooldown_steps": 20}
    for done, keys in (
        (5, {}),
        (60, {"name": "wsd", "cooldown_steps": 20}),
        (90, {"decay_steps": 80}),
    ):
        new, *_ = extended(done, 100, 200, **keys)
        assert new == Curve(200)
    new, old, rate, _ = extended(90, 100, 200, **wsd)
    assert new != Curve(200) and rate(90) == old(90) and rate(145) == pytest.approx(old(95))


def test_hold_keeps_every_rate_that_was_planned():
    _, old, new, _ = extended(60, 100, 150, extend="hold")
    assert [new(step) for step in range(101)] == [old(step) for step in range(101)]
    assert new(149) == old(100)


def test_a_run_may_be_extended_again_and_its_checkpoint_knows():
    once, *_ = extended(60, 100, 150)
    twice, old, new, _ = extended(120, 150, 300, curve=once)
    assert Curve.from_dict(twice.to_dict()) == twice
    assert [new(step) for step in range(121)] == [old(step) for step in range(121)]
    assert new(300) == pytest.approx(PEAK * 0.1)
    assert new(60) == lr(60)


def test_steps_at_a_rate_of_nothing_are_refused():
    with pytest.raises(ConfigError, match="50 steps after step 100 would change nothing"):
        extended(100, 100, 150, name="wsd", cooldown_steps=20)
