"""A step that does not fit the steps before it: its limits, what is kept of it, and when to stop.

A step whose loss or gradient is not finite is never applied. `guard.spikes` also judges finite
steps, by a robust z-score: the distance from the median of the last `window` applied steps, in
units of 1.4826 times the median distance from it (which is the standard deviation where the values
are normal). The limits of a step follow from the steps before it alone. So they are known before
the step is computed, its one verdict needs no further message, and a run that resumes, on whatever
layout, judges as one that was never stopped: the window lies in the checkpoint.
"""

import json
import math
import shlex
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pretrain.config import RunConfig
from pretrain.engines.verdict import FINITE, Guard, StepResult
from pretrain.run_folder import EVIDENCE_FOLDER
from pretrain.watching.history import note, now
from xlstm_io.checkpoint.manifest import step_of_folder
from xlstm_io.errors import ExitCode, UserError
from xlstm_io.storage import Location, write_atomic

if TYPE_CHECKING:  # `check` compares checkpoints without loading megatron-core
    from pretrain.layout import Layout

NORMAL = 1.4826  # standard deviation over median distance, of a normal distribution
# Least unit of the z-score, over the median: a small rise above values that hardly differ is not a
# spike.
LEAST_UNIT = 0.01


class DivergedError(UserError):
    """The run stops because steps were judged bad."""

    exit_code = ExitCode.DIVERGED


class Divergence:
    """What a run knows of its past steps, the same on every rank.

    Args:
        config: the run.
        saved: what `to_dict` gave for the checkpoint; None for a fresh start.

    Attributes:
        onset: the first step of the newest episode of spikes; None where there was none. Steps
            count from 1. A spike within `window` steps after another belongs to its episode.
    """

    def __init__(self, config: RunConfig, saved: Mapping[str, Any] | None = None) -> None:
        self._config, self._options = config, config.guard.spikes
        saved = saved or {}
        self._losses: deque[float] = deque(saved.get("losses", ()), self._options.window)
        self._norms: deque[float] = deque(saved.get("norms", ()), self._options.window)
        self._skipped: int = saved.get("skipped", 0)  # in a row
        self.onset: int | None = saved.get("onset")
        self._last: int | None = saved.get("last")  # spike

    def limits(self) -> Guard:
        """The limits of the next step."""
        options = self._options
        if options.policy == "off" or len(self._losses) < options.window:
            return FINITE
        return Guard(limit(self._losses, options.z_loss), limit(self._norms, options.z_norm))

    def note(self, step: int, result: StepResult) -> None:
        """Take a judged step into account.

        Args:
            step: the step, from 1.
            result: what was found.
        """
        if result.accepted:
            self._skipped = 0
            if self._options.policy != "off":
                self._losses.append(result.loss)
                self._norms.append(result.grad_norm)
            return
        self._skipped += 1
        if self._last is None or step - self._last > self._options.window:
            self.onset = step
        self._last = step

    def must_stop(self, result: StepResult) -> str | None:
        """The key that stops the run after a rejected step, with its value; None to go on."""
        guard = self._config.guard
        if not result.finite and guard.stop_on_nonfinite:
            return "guard.stop_on_nonfinite=true"
        if result.finite and guard.spikes.policy == "stop":
            return "guard.spikes.policy=stop"
        if self._skipped >= guard.max_skipped:
            return f"guard.max_skipped={guard.max_skipped} steps in a row"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "skipped": self._skipped,
            "onset": self.onset,
            "last": self._last,
        }


def limit(values: deque[float], z: float) -> float:
    """The value whose robust z-score among `values` is `z`."""
    middle = median(values)
    distance = median(abs(value - middle) for value in values)
    return middle + z * max(NORMAL * distance, LEAST_UNIT * abs(middle))


@dataclass(frozen=True)
class RejectedStep:
    """A step whose update was not applied.

    Attributes:
        step: the step, from 1.
        result: what was found.
        limits: what it was judged by.
        lr: its learning rate.
        first_sample: its first sample; the others follow.
    """

    step: int
    result: StepResult
    limits: Guard
    lr: float
    first_sample: int

    def __str__(self) -> str:
        found = self.result
        kind = "not finite"
        if found.finite:
            kind = (
                f"a spike (limits: loss {self.limits.max_loss:.4g}, gradient norm "
                f"{self.limits.max_grad_norm:.4g})"
            )
        told = f"loss {found.loss:.6g}, gradient norm {found.grad_norm:.6g}"
        return f"step {self.step}: {told}: {kind}"


def diverged(
    config: RunConfig, rejected: RejectedStep, key: str, good: Location | None, kept: bool = True
) -> str:
    """What to tell the user when a step's update was rejected and the run stops.

    Args:
        config: the run.
        rejected: the step.
        key: what stops the run.
        good: the newest complete checkpoint.
        kept: whether `keep_evidence` could write.
    """
    options = config.optimizer
    remedy = f"lower optimizer.lr={options.lr}"
    if options.clip_grad == 0:
        remedy += ", or clip gradients: optimizer.clip_grad=0 never does"
    if good is not None:
        step, ramp = step_of_folder(good), config.data.ramp
        samples = ramp.samples(rejected.step) - ramp.samples(step)
        remedy += (
            f", or go back and leave out the samples since then: python -m pretrain rewind "
            f"{shlex.quote(config.run.dir)} --to {step} --skip-samples {samples}"
        )
    evidence = f"{EVIDENCE_FOLDER}/ in {config.run.dir} names the samples; " if kept else ""
    return (
        f"{rejected}, so the update was not applied and the run stops ({key}); "
        f"{f'{good} is from before' if good else 'there is no checkpoint yet'}; {evidence}{remedy}"
    )


def keep_evidence(
    run: Path, life: int, rejected: RejectedStep, losses: list[Tensor], layout: "Layout", rows: int
) -> OSError | None:
    """Write what is known of a rejected step into the run folder, and a line of the history.

    Called by all ranks.

    No run ends because this file cannot be written: it would leave the other ranks waiting, and a
    step that is skipped needs nothing of it.

    Args:
        run: the run folder.
        life: number of this life of the run.
        rejected: the step.
        losses: this rank's losses, see `Engine.own_losses`.
        layout: where this process stands.
        rows: rows of a micro-batch.

    Returns:
        Why the file could not be written, on rank 0; None where it was, and on other ranks.
    """
    groups = layout.groups
    # Tensor-parallel ranks have the same losses, and context-parallel ranks parts of one row.
    mine = [loss[:2].tolist() for loss in losses] if groups.tp.rank() == 0 else []
    batches: dict[tuple[int, int], list[float]] = {}
    for replica, found in layout.gather((layout.dp_rank, mine)):
        for number, (total, tokens) in enumerate(found):
            sums = batches.setdefault((replica, number), [0.0, 0.0])
            sums[0] += total
            sums[1] += tokens
    if not layout.is_main:
        return None
    micro_batches = []
    for (replica, number), (total, tokens) in sorted(batches.items()):
        first = rejected.first_sample + (number * layout.dp_size + replica) * rows
        loss = total / max(1.0, tokens)
        micro_batches.append(
            {
                "replica": replica,
                "samples": [first, first + rows],
                "loss": loss if math.isfinite(loss) else str(loss),
                "tokens": int(tokens),
            }
        )
    values = {
        "step": rejected.step,
        "life": life,
        "time": now(),
        "lr": rejected.lr,
        "result": {k: str(v) for k, v in asdict(rejected.result).items() if k != "votes"},
        "limits": {k: str(v) for k, v in asdict(rejected.limits).items()},
        "micro_batches": micro_batches,
    }
    path = run / EVIDENCE_FOLDER / f"step-{rejected.step:08d}-life-{life:06d}.json"
    note(run, "no update", rejected.step, life, {"reason": str(rejected)})
    try:
        write_atomic(path, json.dumps(values, indent=1).encode() + b"\n")
    except OSError as error:
        return error
    return None
