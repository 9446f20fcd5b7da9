"""The one mark that separates a user's mistake from a bug of ours.

Every error that a user can cause (bad config, bad data, a checkpoint of another model) derives
from `UserError`. The command line turns it into one message and exit code 2; anything else is a
bug, keeps its traceback and exits with 1. The message itself states the value, the rule, and the
remedy.
"""

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
    from data_prep.shards import ShardFormatError
    from xlstm_mcore.ckpt_reader import CheckpointFormatError
    from xlstm_mcore.tokenizer_file import TokenizerFileError

    return isinstance(error, ShardFormatError | CheckpointFormatError | TokenizerFileError)
