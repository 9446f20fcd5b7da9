"""The batch script's question: which checkpoint of a run is to be evaluated next?

    python -m slurm.job.evaluations RUN

prints shell assignments: `CHECKPOINT`, the name of the oldest one without a result, or "";
`RESULT`, where its result goes; and `AGAIN`, "yes" while more checkpoints may come. One that a
later life or a rewind has left behind is not evaluated, as no life goes on from it. The results lie
in `RUN/evaluations`. Nothing waits for a checkpoint on a node: the job ends, and looks again later.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from slurm.job.state import (
    CHECKPOINTS_FOLDER,
    RunState,
    names_of_checkpoints,
    starts_of_lives,
    step_that_counts,
)

FOLDER = "evaluations"
QUIET_S = 3 * 24 * 3600.0  # a run that wrote nothing for so long is not expected to go on


def next_checkpoint(run: Path) -> dict[str, str]:
    """What the batch script is told; see above.

    Args:
        run: the run folder.
    """
    folder = run / CHECKPOINTS_FOLDER
    starts = starts_of_lives(folder)
    for name in sorted(names_of_checkpoints(folder)):
        result = run / FOLDER / f"{name}.json"
        # What has a result is not read: a manifest names a file of each rank, and there are many.
        if not result.exists() and step_that_counts(folder / name, starts) is not None:
            return {"CHECKPOINT": name, "RESULT": str(result), "AGAIN": ""}
    return {"CHECKPOINT": "", "RESULT": "", "AGAIN": "" if has_ended(run) else "yes"}


def has_ended(run: Path) -> bool:
    """Whether no further checkpoint is expected: the run is finished, given up, or quiet."""
    files = RunState(run)
    steps = files.progress().get("steps")
    if steps is not None and files.finished(int(steps)):
        return True
    if files.stop_requested or files.load().verdict:
        return True
    written = [
        path.stat().st_mtime
        for path in (
            run,
            run / "progress.json",
            run / CHECKPOINTS_FOLDER,
            files.folder / "state.json",
        )
        if path.exists()
    ]
    return time.time() - max(written, default=0.0) > QUIET_S


def main(words: Sequence[str]) -> int:
    """The command line that the batch script calls."""
    run = Path(words[0])
    (run / FOLDER).mkdir(exist_ok=True)
    for name, text in next_checkpoint(run).items():
        print(f"{name}={shlex.quote(text)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
