"""Batch-size ramp: how many samples each step has, and which samples those are.

A ramp is a list of stages, each a number of steps with a number of samples. After the last stage
every step has the final batch. All answers follow from the step alone. Nothing is counted while
training, so a run that resumes in the middle of a ramp, on any number of processes, has the same
steps. Nothing here imports torch, because `check` uses it too.
"""

from collections.abc import Iterable
from itertools import accumulate


class BatchRamp:
    """Samples per step.

    Args:
        final: samples per step after the last stage.
        stages: (steps, samples per step) of the stages before, in order.
    """

    def __init__(self, final: int, stages: Iterable[tuple[int, int]] = ()):
        stages = list(stages)
        self.sizes = [size for _, size in stages] + [final]
        self._first_step = [0, *accumulate(steps for steps, _ in stages)]
        self._first_sample = [0, *accumulate(steps * size for steps, size in stages)]

    def _stage(self, starts: list[int], value: int) -> int:
        return sum(start <= value for start in starts) - 1

    def size(self, step: int) -> int:
        """Samples of the step after `step` finished ones."""
        return self.sizes[self._stage(self._first_step, step)]

    def samples(self, step: int) -> int:
        """Samples of the first `step` steps together."""
        stage = self._stage(self._first_step, step)
        return self._first_sample[stage] + (step - self._first_step[stage]) * self.sizes[stage]

    def step(self, samples: int) -> int:
        """How many whole steps the first `samples` samples are; the inverse of `samples`."""
        stage = self._stage(self._first_sample, samples)
        return self._first_step[stage] + (samples - self._first_sample[stage]) // self.sizes[stage]
