"""The history of a run, and the configuration of each of its starts, never overwritten.

    RUN/history.jsonl             one JSON object per start and event, in order
    RUN/starts/000003/config.yaml the configuration of the start of life 3
    RUN/starts/000003/provenance.json   code, versions, machine, command and data of that start

The line of a start says which life it was, when and from where it went on, and what differed from
the checkpoint's configuration and alters the result. Events are how a life ends (but for a killed
one), a rewind, a step without an update, and what `pretrain.watching.milestones` tells.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pretrain.run_folder import HISTORY_FILE
from xlstm_io.remote import masked


def append(run: Path, line: Mapping[str, Any]) -> None:
    """Add a line to the history of a run, and flush it to the disk.

    A line that a killed process began is left as it is; the new one does not join it.
    """
    path = run / HISTORY_FILE
    if not path.is_file() and (path.exists() or path.is_symlink()):
        raise OSError(f"{path} is not a file; move it away")
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as history:
        history.write("\n" * torn + masked(json.dumps(line, default=str)) + "\n")
        history.flush()
        os.fsync(history.fileno())


def note(run: Path, event: str, step: int, life: int, about: Mapping[str, Any]) -> None:
    """Add an event to the history of a run; a full disk is left to those who must write.

    Args:
        run: the run folder.
        event: what happened.
        step: finished steps.
        life: which start of the run this is.
        about: what else there is to say; JSON.
    """
    with suppress(OSError):
        append(run, {"life": life, "event": event, "time": now(), "step": step, **about})


def now() -> str:
    """The time in a history: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_history(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's history, in order, without torn and damaged ones.

    Raises:
        OSError: the file cannot be read.
    """
    path = run / HISTORY_FILE
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                found.append(record)
    return found
