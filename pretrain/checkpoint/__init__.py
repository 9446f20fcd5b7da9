"""Checkpoints of a training run: save on any layout, load on any other.

A rank saves and loads `TensorSlice`s: slices of global tensors under global names, wherever they
lie in the memory of this rank. So the layout is not part of the format. The format itself, and the
reader that does not need a trainer, are `xlstm_io.checkpoint.manifest` and `.reader`.

    with CheckpointSaver(run_dir / "checkpoints") as saver:
        saver.save(slices, state, config, step=200)  # goes on in the background
    manifest = load_checkpoint(path, slices)  # in place

All ranks call both.
"""

from pretrain.checkpoint.background import CheckpointSaver
from pretrain.checkpoint.identity import check_same_run
from pretrain.checkpoint.load import (
    Candidates,
    load_checkpoint,
    read_evaluation_together,
    read_manifest_together,
)
from pretrain.checkpoint.ranks import Ranks
from pretrain.checkpoint.retention import Retention
from pretrain.checkpoint.save import save_checkpoint
from xlstm_io.checkpoint.manifest import Manifest, find_latest, read_manifest, resolve
from xlstm_io.checkpoint.reader import TensorSlice
from xlstm_io.errors import CheckpointDamagedError, CheckpointError

__all__ = [
    "Candidates",
    "CheckpointDamagedError",
    "CheckpointError",
    "CheckpointSaver",
    "Manifest",
    "Ranks",
    "Retention",
    "TensorSlice",
    "check_same_run",
    "find_latest",
    "load_checkpoint",
    "read_evaluation_together",
    "read_manifest",
    "read_manifest_together",
    "resolve",
    "save_checkpoint",
]
