"""Errors of saving and loading, the same on every rank."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.checkpoint.api import CheckpointException

from pretrain.errors import UserError
from xlstm_mcore.ckpt_reader import CheckpointFormatError


class CheckpointError(UserError, CheckpointFormatError):
    """A checkpoint cannot be saved or loaded; the message says which, why, and what remains."""


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turn the reader's CheckpointFormatError into the trainer's CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except CheckpointFormatError as error:
        raise CheckpointError(str(error)) from error


@contextmanager
def collective(what: str, remedy: str = "") -> Iterator[None]:
    """Around a call into torch.distributed.checkpoint that all ranks make.

    It gathers every rank's exception and raises the same CheckpointException everywhere, so nobody
    hangs. That one is a BaseException with all tracebacks in its text; here it becomes a
    CheckpointError of one sentence where the cause is the file system or the checkpoint itself,
    `KeyboardInterrupt` where someone pressed Ctrl-C, and RuntimeError for a bug of ours.
    """
    try:
        with warnings.catch_warnings():
            # Saving from one process without a process group is meant here.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        causes = {rank: cause for rank, (cause, _) in sorted(error.failures.items())}
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes.values()):
            raise KeyboardInterrupt from None
        bugs = [c for c in causes.values() if not isinstance(c, OSError | CheckpointFormatError)]
        if bugs or not causes:
            raise RuntimeError(f"{what} failed\n{error}") from error
        rank, cause = next(iter(causes.items()))
        where = f" on rank {rank}" if len(causes) == 1 else f" on {len(causes)} ranks, first {rank}"
        raise CheckpointError(f"{what} failed{where}: {cause}{remedy}") from None
