"""How far a run is, in one small file that anybody may read: `RUN/progress.json`.

Rank 0 replaces it at every log line, every checkpoint and the end. The commands that show a run,
the policy that restarts it and a person with `cat` read it. Training reads one thing in it: that
the run once had a checkpoint, and so must not start anew because none is found.
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from xlstm_io.errors import CheckpointError
from xlstm_io.remote import masked_values
from xlstm_io.storage import read_file, write_atomic

PROGRESS_FILE = "progress.json"


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        status: "running", "stopped", "diverged" or "done".
        step: finished steps.
        steps: steps of the whole run.
        life: number of the life that wrote this.
        checkpoint: the newest complete checkpoint, or None.
        checkpoint_step: its step, or None.
        step_seconds: of the last step; None before the first.
        save_seconds: of the last checkpoint, from its begin until it was complete, also where an
            earlier life saved it; None before the first.
        stragglers: hosts that are slow now; see `pretrain.watching.ranks`.
    """

    status: str
    step: int
    steps: int
    life: int
    checkpoint: str | None = None
    checkpoint_step: int | None = None
    step_seconds: float | None = None
    save_seconds: float | None = None
    stragglers: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Replace the file in a run folder.

        A full disk does not end a run here: its checkpoints may lie elsewhere.
        """
        data = json.dumps(masked_values(asdict(self)), indent=1).encode() + b"\n"
        with suppress(OSError):
            write_atomic(folder / PROGRESS_FILE, data, sync=False)


def read_progress(folder: Path) -> Progress | None:
    """What the file in a run folder says; None when there is none, or it is not readable."""
    try:
        return Progress(**json.loads(read_file(folder / PROGRESS_FILE, 1 << 20, links=True)))
    except (OSError, ValueError, TypeError):
        return None


def check_nothing_is_lost(folder: Path, checkpoints: object) -> None:
    """Nothing when a run may start at step 0 because no checkpoint was found.

    Args:
        folder: the run folder.
        checkpoints: where its checkpoints were looked for.

    Raises:
        CheckpointError: the run has had a checkpoint.
    """
    progress = read_progress(folder)
    if progress is not None and progress.checkpoint is not None:
        raise CheckpointError(
            f"run.dir={folder} had done {progress.step} steps and saved {progress.checkpoint}, but "
            f"{checkpoints} holds no checkpoint; make that folder available again (is it mounted?),"
            " or start anew with --fresh, which renames the old run folder"
        )
