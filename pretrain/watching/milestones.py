"""The steps at which a run changes by plan: warmup, batch ramp, data phases, cooldown.

All of them follow from the run file and the learning-rate curve, so a life knows them when it
begins. Each is a line in the log and in the run's history when its first step is done.
"""

from bisect import bisect_left
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.config import RunConfig
from pretrain.layout import Layout
from pretrain.lr_curve import Curve
from pretrain.watching.history import note
from pretrain.watching.metrics import MetricLogger
from pretrain.watching.watcher import StepWatcher, WatchedStep

if TYPE_CHECKING:  # a resume tells of itself with this package
    from pretrain.resume import Start


def milestones(config: RunConfig, curve: Curve, moved: int = 0) -> dict[int, list[tuple[str, str]]]:
    """What begins at which step.

    Args:
        config: the run.
        curve: of its learning rate.
        moved: samples by which the run is ahead of its batch ramp, as after a rewind that left
            some out.

    Returns:
        By the number of the first step, from 1: kind and words of each change.
    """
    found: dict[int, list[tuple[str, str]]] = {}

    def add(finished: int, kind: str, words: str) -> None:
        if 0 < finished < config.run.steps:
            found.setdefault(finished + 1, []).append((kind, words))

    data, schedule = config.data, config.schedule
    rate = curve.rates(config.optimizer.lr, schedule)
    warm = schedule.warmup_steps
    add(warm, "warmup", f"over, and the learning rate is {rate(warm):.3g}")
    for finished, rows in zip(
        accumulate(stage.steps for stage in data.batch_ramp), data.ramp.sizes[1:], strict=True
    ):
        add(finished, "batch ramp", f"{rows:,} rows per step")
    for phase in data.phases:
        total = sum(phase.weights.values())
        shares = ", ".join(f"{name} {100 * w / total:.3g}%" for name, w in phase.weights.items())
        finished = data.ramp.step(max(0, phase.from_sample - moved))
        add(finished, "data phase", f"from sample {phase.from_sample:,} on {shares}")
    if schedule.cooldown_steps:
        start = max(curve.steps - schedule.cooldown_steps, warm)
        finished = bisect_left(range(config.run.steps), start, key=curve.place)
        end = rate(config.run.steps)
        add(
            finished,
            "cooldown",
            f"the learning rate goes from {rate(finished):.3g} to {end:.3g} until step "
            f"{config.run.steps:,}",
        )
    return found


class MilestoneWatcher(StepWatcher):
    """Tells when a run changes by plan, on the rank that logs.

    Args:
        config: the run.
        layout: where this process stands.
        start: what this life starts from.
        life: of the run; 0 where there is no history.
    """

    def __init__(self, config: RunConfig, layout: Layout, start: "Start", life: int) -> None:
        moved = start.cursor.consumed_samples - config.data.ramp.samples(start.state.step)
        self._found = milestones(config, start.curve, moved)
        self._folder, self._tells, self._life = Path(config.run.dir), layout.is_main, life

    def due(self, step: int) -> bool:
        """Whether something begins with the step after which `step` steps are finished."""
        return step in self._found

    def tell(self, seen: WatchedStep, metrics: MetricLogger) -> None:
        """Say what began."""
        for kind, words in self._found[seen.step] if self._tells else ():
            metrics.message(f"step {seen.step}: {kind}: {words}")
            if self._life:
                note(self._folder, kind, seen.step, self._life, {"reason": words})
