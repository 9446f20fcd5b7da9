"""What a life leaves in the run folder when it begins; see `pretrain.watching.history`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.checkpoint import CheckpointSaver
from pretrain.config import RunConfig, save_config
from pretrain.resume import Start
from pretrain.run_folder import CONFIG_FILE, PROVENANCE_FILE, STARTS_FOLDER
from pretrain.watching.history import append, now
from xlstm_io.checkpoint import lives
from xlstm_io.storage import write_atomic


def record_life(
    life: int,
    config: RunConfig,
    start: Start,
    processes: int,
    saver: CheckpointSaver,
    provenance: Mapping[str, Any],
) -> None:
    """Note that a life begins: in the run's history, and among its checkpoints.

    Called by all ranks. Older lives cannot go beyond the step that is noted among the checkpoints.

    Args:
        life: its number; 0 for a tool that trains in a folder of its own, and leaves no note.
        config: its configuration.
        start: what it starts from.
        processes: how many processes it has.
        saver: of the run's checkpoint folder.
        provenance: see `pretrain.watching.provenance`; that of the first rank is kept.

    Raises:
        CheckpointError: one of the two folders cannot be written.
    """
    if not life:
        return
    run, ranks = Path(config.run.dir), saver.ranks
    ranks.first(
        f"writing to run.dir={run}",
        lambda: _record_start(run, life, config, start, processes, provenance),
    )
    ranks.first(
        f"writing to {saver.folder}",
        lambda: lives.record_start(
            saver.folder,
            life,
            start.state.step,
            run=None if config.checkpoint.dir is None else run,
        ),
    )


def _record_start(
    run: Path,
    life: int,
    config: RunConfig,
    start: Start,
    processes: int,
    provenance: Mapping[str, Any],
) -> None:
    """Keep configuration and provenance of a start, and add its line to the history."""
    folder = run / STARTS_FOLDER / f"{life:06d}"
    folder.mkdir(parents=True)  # a life has one start
    save_config(config, folder / CONFIG_FILE)
    write_atomic(folder / PROVENANCE_FILE, json.dumps(provenance, indent=1).encode() + b"\n")
    append(
        run,
        {
            "life": life,
            "event": "start",
            "time": now(),
            "step": start.state.step,
            "checkpoint": None if start.checkpoint is None else str(start.checkpoint),
            "processes": processes,
            "configuration": f"{STARTS_FOLDER}/{folder.name}/{CONFIG_FILE}",
            "changes": [
                {"key": change.name, "before": change.before, "now": change.now}
                for change in start.changes
            ],
            "notes": start.notes,
        },
    )
