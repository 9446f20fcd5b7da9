"""Which checkpoint of a run a user means: the newest, the best, that of a step, or a path."""

import math
from contextlib import suppress

from xlstm_io.checkpoint.evaluation import read_evaluation
from xlstm_io.checkpoint.manifest import (
    MANIFEST_NAME,
    checkpoints_folder,
    newest_first,
    parse_manifest,
    resolve,
    step_of_folder,
)
from xlstm_io.errors import CheckpointError
from xlstm_io.storage import Location, exists, location

BEST = "best"


def choose(path: Location | str, which: str | None = None) -> Location:
    """A checkpoint's folder.

    Args:
        path: a checkpoint, a run folder, or a folder of checkpoints; local or an fsspec URL.
        which: None for the checkpoint itself, or a run's newest; `best` for the lowest validation
            loss that was measured at a checkpoint's own step; a number for the checkpoint of that
            step; else the name of a step folder of the run, or a path.

    Raises:
        CheckpointError: there is none.
    """
    if which is None:
        return resolve(path)
    by_number = which.isdecimal()
    if which != BEST and not by_number:
        named = checkpoints_folder(path) / which
        return resolve(named if exists(named / MANIFEST_NAME) else which)
    try:
        if exists(location(path) / MANIFEST_NAME):
            raise CheckpointError(
                f"{path} is one checkpoint; --checkpoint {which} chooses among those of a run "
                "folder"
            )
        chosen = _of_step(path, int(which)) if by_number else _best(path)
        found = [] if chosen else list(newest_first(path, []))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if chosen is None:
        steps = ", ".join(str(step_of_folder(one)) for one in reversed(found)) or "none"
        lacking = "with that step" if by_number else "whose validation loss was measured"
        raise CheckpointError(
            f"{path} has no complete checkpoint {lacking} (--checkpoint {which}); steps: {steps}"
        )
    return chosen


def _of_step(root: Location | str, step: int) -> Location | None:
    return next(newest_first(root, [], steps=(step,)), None)


def _best(root: Location | str) -> Location | None:
    """The one with the lowest loss; of equals the newest. Only its files are looked at."""
    measured = []
    for path in newest_first(root, [], check_files=False):
        evaluation = read_evaluation(path, parse_manifest(path, check_files=False))
        if evaluation is not None and math.isfinite(evaluation.loss):
            measured.append((evaluation.loss, path))
    for _, path in sorted(measured, key=lambda pair: pair[0]):
        with suppress(CheckpointError):
            parse_manifest(path)
            return path
    return None
