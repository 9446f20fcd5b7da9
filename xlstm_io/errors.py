"""The one mark that separates a user's mistake from a bug of ours.

Every error that a user can cause (bad config, bad data, a checkpoint of another model) derives
from `UserError`. The command line turns it into one message and exit code 2; anything else is a
bug, keeps its traceback and exits with 1. The message itself states the value, the rule, and the
remedy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_BAD_INPUT = 2
EXIT_RESUMABLE = 75  # sysexits' EX_TEMPFAIL: interrupted, the same command continues
EXIT_SECOND_INTERRUPT = 130  # 128 + SIGINT, the shell's convention


class UserError(ValueError):
    """A mistake in what the user gave us; the message says value, rule and remedy."""


class ConfigError(UserError):
    """One or more things are wrong with a run configuration; the message lists all of them."""


def is_user_error(error: BaseException) -> bool:
    """Whether an error is the user's to fix: ours, or one of the packages that know no trainer.

    Those are a damaged shard, found while rows are read, a damaged checkpoint, and a file that is
    no tokenizer.
    """
    if isinstance(error, UserError):
        return True
    from xlstm_io.errors import CheckpointFormatError, ShardFormatError, TokenizerFileError

    return isinstance(error, ShardFormatError | CheckpointFormatError | TokenizerFileError)


class PrepError(ValueError):
    """Bad input or configuration; the command line prints the message and exits with 2."""


class Interrupted(Exception):
    """A signal asked the job to stop; what is finished is kept; exit code 75."""


class CheckpointFormatError(ValueError):
    """A checkpoint is missing, incomplete, damaged, or does not hold what is asked of it."""


class DamagedError(CheckpointFormatError):
    """A checkpoint is not what was written: cut short, altered, or never completed."""


class UnfinishedError(DamagedError):
    """A folder without a manifest: an attempt that was cut short, or is still being written."""


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


class ShardFormatError(ValueError):
    """A shard folder is missing, unfinished, or not of the format that this code reads."""


class TokenizerFileError(ValueError):
    """A file that is no tokenizer; the message names it."""
