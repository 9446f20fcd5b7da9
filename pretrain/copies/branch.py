"""A cooldown branch: a run that leaves another one in its stable phase and lets the rate fall.

A schedule of warmup, stable phase and cooldown (WSD) is trained once, and cooled down from several
places. The branch begins with a copy of a checkpoint, so it goes on with the same weights, moments
and samples as the run itself would, and the run may train on meanwhile.
"""

from dataclasses import dataclass
from pathlib import Path

from pretrain.config import RunConfig, config_of_checkpoint, save_config
from pretrain.copies.copying import copy_checkpoint
from xlstm_io.checkpoint.manifest import CHECKPOINTS_FOLDER, read_manifest
from xlstm_io.errors import ConfigError
from xlstm_io.storage import Location

RUN_FILE = "run.yaml"
STABLE = ("constant", "wsd")


@dataclass(frozen=True)
class Branch:
    """A cooldown branch that can be launched.

    Attributes:
        run_file: its run file.
        step: finished steps when it leaves.
        config: what the run file says.
    """

    run_file: Path
    step: int
    config: RunConfig


def make_branch(
    source: Location, out: Path, steps: int, shape: str | None = None, end: float | None = None
) -> Branch:
    """Make the folder of a branch, with its run file and its first checkpoint.

    Args:
        source: the checkpoint that it leaves from.
        out: its run folder; must not hold a run.
        steps: length of the cooldown.
        shape: `schedule.cooldown_shape`; None for that of the run.
        end: `schedule.cooldown_min_lr_ratio`; None for that of the run.

    Raises:
        ConfigError: the checkpoint does not lie in a stable phase, or the folder is in use.
        CheckpointError: it cannot be copied.
    """
    manifest = read_manifest(source)
    config = config_of_checkpoint(manifest.config, {}, str(source))
    _check_stable(config, manifest.step, source)
    if steps < 1:
        raise ConfigError(f"--steps={steps} makes no cooldown; use 1 or more")
    if out.exists() and ((out / RUN_FILE).exists() or (out / CHECKPOINTS_FOLDER).exists()):
        raise ConfigError(f"--out={out} holds a run already; choose another folder")
    changes = {
        "run.dir": str(out),
        "run.steps": manifest.step + steps,
        "checkpoint.dir": None,
        "schedule.cooldown_steps": steps,
        "schedule.extend": "recompute",  # the rate agrees where the branch leaves
    }
    if shape is not None:
        changes["schedule.cooldown_shape"] = shape
    if end is not None:
        changes["schedule.cooldown_min_lr_ratio"] = end
    branch = config_of_checkpoint(manifest.config, changes, str(source))
    copy_checkpoint(source, out)
    save_config(branch, out / RUN_FILE)
    return Branch(out / RUN_FILE, manifest.step, branch)


def _check_stable(config: RunConfig, step: int, source: Location) -> None:
    schedule = config.schedule
    if schedule.name not in STABLE:
        raise ConfigError(
            f"schedule.name={schedule.name} has no stable phase to leave from; a cooldown branch "
            f"needs {' or '.join(STABLE)}"
        )
    end = config.run.steps - schedule.cooldown_steps
    if not schedule.warmup_steps <= step <= end:
        raise ConfigError(
            f"{source}: step {step} lies outside the stable phase, steps {schedule.warmup_steps} "
            f"to {end}; choose one in it with --checkpoint STEP"
        )
