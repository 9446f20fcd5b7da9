"""The learning rate as a pure function of the step.

A resumed run, or a run at another layout, asks the same question and gets the same answer. `step`
counts from 0 and is the number of optimizer steps already done. When `run.steps` changes in the
middle of a run, `schedule.extend` says how the curve goes on (`pretrain.lr_curve`).

    warmup      lr (step + 1) / warmup_steps              for step < warmup_steps
    main part   lr ratio(t), t = (step - warmup_steps) / decay_steps
    cooldown    over the last cooldown_steps, from s, where the main part stood, to
                e = lr cooldown_min_lr_ratio; u in [0, 1] is the share of it that is done

with ratio(t), m = min_lr_ratio, reaching m at t = 1:

    constant     1      (and wsd: warmup, stable, decay in the cooldown; arXiv 2404.06395)
    linear       1 - (1 - m) t
    cosine       m + (1 - m) (1 + cos(pi t)) / 2
    exponential  m ** t

and the cooldown's shapes (1-sqrt: arXiv 2405.18392):

    linear       s + (e - s) u
    1-sqrt       s + (e - s) sqrt(u)
    cosine       e + (s - e) (1 + cos(pi u)) / 2
    exponential  s (e / s) ** u

Linear and cosine stay at m beyond t = 1; exponential keeps falling at its rate, which is how the
7B run used it (a tenth at 500K steps, then on to 540K, then the cooldown; arXiv 2503.13427).
"""

import math

from pretrain.config import ScheduleConfig


def _ratio(name: str, progress: float, floor: float) -> float:
    """Share of the peak after `progress` of the decay (1.0 = decay_steps done)."""
    if name in ("constant", "wsd"):
        return 1.0
    if name == "exponential":
        return floor**progress
    progress = min(progress, 1.0)
    if name == "linear":
        return 1.0 - (1.0 - floor) * progress
    if name == "cosine":
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    raise AssertionError(f"unknown schedule {name!r}: the schema lets no other through")


def _cooldown(shape: str, start: float, end: float, done: float) -> float:
    """Rate after the share `done` of a cooldown from `start` to `end`."""
    if shape == "linear":
        return start + (end - start) * done
    if shape == "1-sqrt":
        return start + (end - start) * math.sqrt(done)
    if shape == "cosine":
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * done))
    if shape == "exponential":
        return start * (end / start) ** done
    raise AssertionError(f"unknown cooldown {shape!r}: the schema lets no other through")


def learning_rate(step: float, *, peak: float, schedule: ScheduleConfig, steps: int) -> float:
    """Learning rate of the step after `step` finished ones.

    Args:
        step: optimizer steps already done, or a place between two steps of a stretched curve. Steps
            beyond `steps` stay where the cooldown ended.
        peak: the rate after the warmup.
        schedule: the shape. `decay_steps=None` means all steps between warmup and cooldown.
        steps: optimizer steps in the whole run.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    main_steps = steps - schedule.warmup_steps - schedule.cooldown_steps
    decay_steps = max(1, main_steps if schedule.decay_steps is None else schedule.decay_steps)

    def main(at: float) -> float:
        progress = (at - schedule.warmup_steps) / decay_steps
        return peak * _ratio(schedule.name, progress, schedule.min_lr_ratio)

    cooldown_start = max(steps - schedule.cooldown_steps, schedule.warmup_steps)
    if schedule.cooldown_steps and step >= cooldown_start:
        done = min(1.0, (step - cooldown_start) / (steps - cooldown_start))
        end = peak * schedule.cooldown_min_lr_ratio
        return _cooldown(schedule.cooldown_shape, main(cooldown_start), end, done)
    return main(step)
