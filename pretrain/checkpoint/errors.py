"""Errors of saving and loading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pretrain.errors import UserError
from xlstm_mcore.ckpt_manifest import CheckpointFormatError, DamagedError


class CheckpointError(UserError, CheckpointFormatError):
    """A checkpoint cannot be saved or loaded; the message says which, why, and what remains."""


class CheckpointDamagedError(CheckpointError, DamagedError):
    """A checkpoint is not what was written; an older one may be."""


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turn the reader's errors and the file system's into the trainer's CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except DamagedError as error:
        raise CheckpointDamagedError(str(error)) from error
    except (CheckpointFormatError, OSError) as error:
        raise CheckpointError(str(error)) from error
