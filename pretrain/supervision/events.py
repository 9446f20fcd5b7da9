"""`run.on_event`: a command of the user's that hears when a run stops, diverges or ends.

The command gets one JSON object on stdin. It is a word list as a shell reads it, but no shell runs
it. Whatever it does, the run's exit code stays what it is.
"""

import json
import shlex
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

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
    time = datetime.now(UTC).isoformat(timespec="seconds")
    body = json.dumps({"event": event, "time": time, **about})
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
