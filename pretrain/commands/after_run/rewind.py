"""Take a run back to an earlier checkpoint, and leave out the samples that come next.

    python -m pretrain rewind RUN --to 12000 --skip-samples 4096

For a person who has seen the loss of a run go wrong. Nothing is deleted. A rewind counts as a life
of the run that begins at the checkpoint, so the checkpoints beyond it are superseded: named, and
never loaded. The next start of the run goes on from there, with the samples that are left out in
its data cursor.
"""

import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pretrain.config import load_config
from pretrain.run_folder import (
    CONFIG_FILE,
    EVIDENCE_FOLDER,
    METRICS_FILE,
    SUMMARY_FILE,
    checkpoints_of,
)
from pretrain.supervision.lease import take_run
from pretrain.supervision.progress_file import read_progress
from pretrain.watching.history import append, now
from xlstm_io.checkpoint import lives
from xlstm_io.checkpoint.manifest import (
    newest_first,
    parse_manifest,
    step_of_folder,
    verify_hashes,
)
from xlstm_io.errors import CheckpointError, ConfigError, ExitCode
from xlstm_io.storage import Location


def main(run_dir: str, to: int, skip_samples: int) -> int:
    """Rewind the run in a folder; returns the exit code.

    Args:
        run_dir: the run's folder.
        to: step of the checkpoint to go back to.
        skip_samples: how many of the samples that come after that step are left out.

    Raises:
        UserError: it is not a run folder, the run is at work, or there is no sound checkpoint of
            that step.
    """
    if skip_samples < 0:
        raise ConfigError(f"--skip-samples={skip_samples} is negative; use 0 or more")
    run = Path(run_dir)
    if not (run / CONFIG_FILE).exists():
        raise ConfigError(f"{run} has no {CONFIG_FILE}; give the run.dir of a run")
    config = load_config(run / CONFIG_FILE)
    folder = checkpoints_of(config, run)
    own = config.checkpoint.dir is None
    path, beyond = _find(folder, to)
    # Copied checkpoints bring the numbers of the lives of their run with them.
    every = [parse_manifest(one, check_files=False) for one in (path, *beyond)]
    written = [manifest.state.get("life", 0) for manifest in every]
    with take_run(run, folder, after=max(written)) as lease:
        _keep_records(run, lease.life)
        lives.record_start(folder, lease.life, to, skip_samples, run=None if own else run)
        append(
            run,
            {
                "life": lease.life,
                "event": "rewind",
                "time": now(),
                "step": to,
                "checkpoint": str(path),
                "skip_samples": skip_samples,
            },
        )
        progress = read_progress(run)
        if progress is not None:
            replace(
                progress, status="stopped", step=to, checkpoint=str(path), checkpoint_step=to
            ).write(run)
    first = every[0].state["cursor"]["consumed_samples"]
    print(f"the next start of {run} goes on from {path}", end="")
    print(f", without the samples {first} to {first + skip_samples - 1}" if skip_samples else "")
    for old in beyond:
        print(f"superseded, never loaded again, and yours to delete: {old}")
    return ExitCode.DONE


def _keep_records(run: Path, life: int) -> None:
    """Keep what the run has said until now in `evidence/`.

    The next start drops the metrics beyond its step. A summary would say that the run is finished.
    """
    evidence = run / EVIDENCE_FOLDER
    evidence.mkdir(exist_ok=True)
    with suppress(FileNotFoundError):
        shutil.copyfile(run / METRICS_FILE, evidence / f"metrics-before-life-{life:06d}.jsonl")
    with suppress(FileNotFoundError):
        (run / SUMMARY_FILE).rename(evidence / f"summary-before-life-{life:06d}.json")


def _find(folder: Location, step: int) -> tuple[Location, list[Location]]:
    """The newest checkpoint of a step, read whole, and all beyond it."""
    path = next(newest_first(folder, [], steps=(step,)), None)
    if path is None:
        steps = sorted({step_of_folder(one) for one in newest_first(folder, [])})
        there = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(
            f"--to {step}: {folder} holds no complete checkpoint of that step that counts; there "
            f"are those of the steps: {there}"
        )
    verify_hashes(path, parse_manifest(path))
    # What is beyond it only gets a name, so its files do not matter.
    beyond = newest_first(folder, [], steps=range(step + 1, sys.maxsize), check_files=False)
    return path, list(beyond)
