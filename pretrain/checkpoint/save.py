"""Saving: every rank writes its slices to one file, then the first rank writes the manifest.

torch.distributed.checkpoint (DCP) is not used. Its safetensors writer keys tensors by name alone,
so two slices of one tensor in one file overwrite each other, and it holds the whole file in memory.
Its other writer pickles. What is left of it then is the exchange of plans and errors, and
`pretrain.checkpoint.ranks` has that in a form that a background thread can use.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pretrain.checkpoint.ranks import Ranks
from pretrain.checkpoint.retention import Retention, apply_retention
from xlstm_io.checkpoint.manifest import CHECKPOINTS_FOLDER
from xlstm_io.checkpoint.reader import TensorSlice
from xlstm_io.checkpoint.writer import (
    discard_attempt,
    finish_attempt,
    start_attempt,
    write_data_file,
)
from xlstm_io.errors import Superseded
from xlstm_io.storage import Location, location


def save_checkpoint(
    root: Location | str,
    slices: Sequence[TensorSlice],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    step: int,
    files: Mapping[str, bytes] | None = None,
    ranks: Ranks | None = None,
    keep: int | None = None,
) -> Location:
    """Save a checkpoint under `root`/checkpoints and return its folder when it is complete.

    All ranks call it. No rank holds more than one stored slice besides what it was given.

    Args:
        root: The run's folder, a path or an fsspec URL.
        slices: What this rank alone owns. The slices of all ranks together must cover every tensor
            exactly once.
        state: The training state, as JSON; that of the first rank is stored.
        config: The configuration, likewise.
        step: Training steps done.
        files: Small files that travel with the checkpoint, by name; those of the first rank are
            stored. They are the tokenizer's.
        ranks: Who saves together (default: all; without torch.distributed: this process).
        keep: Afterwards all but so many of the newest complete checkpoints are deleted (None: all
            are kept).

    Raises:
        CheckpointError: The file system refuses, slices overlap or are missing, or `state` or
            `config` is not JSON. The error is the same on every rank. Earlier checkpoints are
            untouched then, and the incomplete attempt is removed.
    """
    ranks = ranks or Ranks()
    folder = location(root) / CHECKPOINTS_FOLDER
    path = write_checkpoint(folder, slices, state, config, step=step, files=files, ranks=ranks)
    if keep is not None and ranks.is_first:
        apply_retention(folder, Retention(keep=keep), path)
    return path


def write_checkpoint(
    folder: Location,
    slices: Sequence[TensorSlice],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    step: int,
    files: Mapping[str, bytes] | None = None,
    ranks: Ranks,
    fence: Callable[[], None] = lambda: None,
) -> Location:
    """`save_checkpoint` into exactly `folder`, without retention; may run in any thread.

    Args:
        folder: Where the checkpoints lie.
        slices: See `save_checkpoint`, also for the other arguments.
        state: See there.
        config: See there.
        step: See there.
        files: See there.
        ranks: See there.
        fence: Called on the first rank right before the manifest makes the checkpoint complete. It
            raises Superseded when this process may no longer write.
    """
    what = f"saving the checkpoint of step {step}"
    remedy = f"; nothing was saved, earlier checkpoints in {folder} are as they were"
    path = ranks.first(what, lambda: start_attempt(folder, step, state, config), remedy)
    try:
        data_files = ranks.together(what, lambda: write_data_file(path, ranks.rank, slices), remedy)
        ranks.first(
            what,
            lambda: finish_attempt(path, data_files, step, state, config, files or {}, fence),
            remedy,
        )
    except Superseded:
        raise  # a life that has been superseded deletes nothing
    except BaseException:
        # Errors of the ranks reach all of them, so nobody is writing any more.
        if ranks.is_first:
            discard_attempt(path)
        raise
    return path
