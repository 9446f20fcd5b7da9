"""How a life of a run ends: a line of its history, and `run.on_event` for a command of the user's.

The command gets one JSON object in a line on stdin. It is a word list as a shell reads it, but no
shell runs it. Whatever it does, the run's exit code stays what it is.
"""

import json
import math
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.config import RunConfig
from pretrain.watching.history import note, now
from xlstm_io.storage import Location, absolute
from xlstm_io.terminal import tell

LIMIT_S = 30.0  # a batch system kills soon after its signal


def send(command: str, event: str, about: Mapping[str, Any]) -> str | None:
    """Run the command and wait for it.

    Args:
        command: words, quoted as in a shell.
        event: what happened: `stopped`, `diverged` or `done`.
        about: what else the object says; JSON.

    Returns:
        What went wrong, in words; None if it ended with 0.
    """
    body = json.dumps({"event": event, "time": now(), **about}) + "\n"
    try:
        done = subprocess.run(
            shlex.split(command), input=body, text=True, timeout=LIMIT_S, check=False
        )
    except (OSError, ValueError) as error:
        return f"run.on_event={command!r} cannot be run: {error}"
    except subprocess.TimeoutExpired:
        return f"run.on_event={command!r} was ended after {LIMIT_S:.0f} s"
    if done.returncode:
        return f"run.on_event={command!r} ended with exit code {done.returncode}"
    return None


def report(
    config: RunConfig,
    event: str,
    why: str,
    step: int,
    life: int,
    checkpoint: Location | None,
    loss: float | None,
) -> None:
    """Note in a run's history how a life ends, and tell the run's command, if it has one.

    What goes wrong is printed, and ends nothing.

    Args:
        config: the run.
        event: see `send`.
        why: why it stopped or diverged.
        step: finished steps.
        life: which start of the run this is.
        checkpoint: the newest checkpoint.
        loss: the newest validation loss.
    """
    note(Path(config.run.dir), event, step, life, {"reason": why} if why else {})
    if config.run.on_event is None:
        return
    if isinstance(checkpoint, Path):
        checkpoint = absolute(checkpoint)  # the command may look from elsewhere
    about = {
        "run": str(absolute(config.run.dir)),
        "step": step,
        "steps": config.run.steps,
        "life": life,
        "reason": why,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "valid_loss": loss if loss is not None and math.isfinite(loss) else None,
    }
    problem = send(config.run.on_event, event, about)
    if problem is not None:
        tell(problem)
