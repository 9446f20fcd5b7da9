"""The learning-rate curve of a run whose length was changed in the middle.

The formulas of `pretrain.lr_schedule` need the number of steps in the whole run. A run that is
extended would thus move along another curve, and its learning rate would jump: a finished cosine
back up. `schedule.extend` says what happens instead:

    stretch    what is left of the curve is stretched over the steps that are left, so the rate goes
               on without a jump and ends where it would have ended. After the end of the curve its
               last rate is held. Where the curve up to here does not depend on the length of the
               run (in the warmup, at a constant rate, with decay_steps given), the curve of the new
               length goes on without a jump as it is, and is used as it is.
    hold       the curve stays as it was planned, and its last rate is held.
    recompute  the curve of the new length from here on; the rate may jump.

Shortening a run follows the same rule. A change of another key of the section `schedule` asks for
another curve, which is then computed anew.

What was decided lies in the checkpoint (`Curve.to_dict`), so it holds for every later resume.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.config import OptimizerConfig, ScheduleConfig
from pretrain.lr_schedule import learning_rate
from xlstm_io.errors import ConfigError


@dataclass(frozen=True)
class Turn:
    """A change of the run's length.

    Attributes:
        at: finished steps when it was made.
        end: the step at which the curve ended before.
        pace: steps of the curve before in one step from there on; 0 holds its last rate.
    """

    at: int
    end: int
    pace: float


@dataclass(frozen=True)
class Curve:
    """Which place of the schedule's formulas each step of a run has.

    Attributes:
        steps: length of the run that the formulas are told.
        turns: changes of the run's length since then, in order.
    """

    steps: int
    turns: tuple[Turn, ...] = ()

    def place(self, step: float) -> float:
        """The step of a run without any turn that has the same rate."""
        for turn in reversed(self.turns):
            if step > turn.at:
                step = min(turn.end, turn.at + (step - turn.at) * turn.pace)
        return step

    def rates(self, peak: float, schedule: ScheduleConfig) -> Callable[[int], float]:
        """The learning rate as a function of the number of finished steps."""
        return lambda step: learning_rate(
            self.place(step), peak=peak, schedule=schedule, steps=self.steps
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"steps": self.steps, "turns": [asdict(turn) for turn in self.turns]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Curve":
        """Inverse of `to_dict`."""
        return cls(values["steps"], tuple(Turn(**turn) for turn in values["turns"]))


def continued(
    curve: Curve,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    *,
    done: int,
    before: int,
    steps: int,
) -> tuple[Curve, str]:
    """The curve of a run whose length changes, and what is said about it.

    Args:
        curve: the curve so far.
        optimizer: for the peak rate.
        schedule: for the formulas, and `schedule.extend`.
        done: finished steps.
        before: steps that the run was to have.
        steps: steps that it is to have now.

    Raises:
        ConfigError: every step from here on would have a learning rate of 0.
    """
    peak, anew = optimizer.lr, Curve(steps)
    if schedule.extend == "recompute" or (
        schedule.extend == "stretch" and _agree(curve, anew, peak, schedule, done)
    ):
        new, what = anew, "the curve of the new length is used"
    else:
        stretched = schedule.extend == "stretch"
        pace = max(0, before - done) / (steps - done) if stretched and steps > done else 1.0
        new = Curve(curve.steps, (*curve.turns, Turn(done, before, pace)))
        what = "what is left of the curve is stretched over the steps that are left"
        if done >= before:
            what = "the curve has ended, and its last rate is held"
        elif not stretched:
            what = "the curve stays as it was planned, and its last rate is held"
    last, rate = curve.rates(peak, schedule), new.rates(peak, schedule)
    if steps > done and rate(done) == 0:
        raise ConfigError(
            f"run.steps={steps}: {what}, and that rate is 0, so the {steps - done} steps after "
            f"step {done} would change nothing; set schedule.extend=recompute, with which the rate "
            "jumps up again, or go back to before the cooldown with python -m pretrain rewind"
        )
    return new, (
        f"run.steps was {before} and is {steps}: {what} (schedule.extend={schedule.extend}); "
        f"learning rate {last(max(0, done - 1)):.3g} in the last step, {rate(done):.3g} in the "
        f"next, {rate(max(done, steps - 1)):.3g} in step {steps}"
    )


def _agree(one: Curve, two: Curve, peak: float, schedule: ScheduleConfig, done: int) -> bool:
    """Whether two curves have the same rate in the last finished step and in the next."""
    first, second = one.rates(peak, schedule), two.rates(peak, schedule)
    return all(first(step) == second(step) for step in (max(0, done - 1), done))
