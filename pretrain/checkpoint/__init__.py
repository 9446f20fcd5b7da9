"""Checkpoints of a training run: save on any layout, load on any other.

What is saved and loaded are `Chunk`s: rectangles of global tensors under canonical names, wherever
they lie in this rank's memory. The layout is therefore not part of the format. The format itself
and the reader that needs no trainer are in `xlstm_mcore.ckpt_reader`.

    path = save_checkpoint(run_dir, chunks, state, config, step=200, keep=3)
    manifest = load_checkpoint(path, chunks)  # in place

All ranks call both.
"""

from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.identity import check_same, check_same_model
from pretrain.checkpoint.load import (
    find_latest,
    find_latest_together,
    load_checkpoint,
    read_manifest,
    resolve,
    show,
)
from pretrain.checkpoint.save import save_checkpoint
from xlstm_mcore.ckpt_reader import Chunk, Manifest

__all__ = [
    "CheckpointError",
    "Chunk",
    "Manifest",
    "check_same",
    "check_same_model",
    "find_latest",
    "find_latest_together",
    "load_checkpoint",
    "read_manifest",
    "resolve",
    "save_checkpoint",
    "show",
]
