"""The errors that a user can cause, and the exit codes of every command.

Every error that a user can cause (a bad configuration, bad data, a damaged checkpoint) derives from
`UserError`. Its message states the value, the rule and the remedy. A command line catches
`UserError`, prints the message and exits with `ExitCode.BAD_INPUT`. Any other exception is a bug of
ours: it keeps its traceback, and Python exits with 1.

An error may be defined in the module that raises it, as long as it derives from this family.
"""

import errno
from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What the exit code of a command means; the only list of exit codes.

    Attributes:
        meaning: one phrase for the documentation.
    """

    meaning: str

    def __new__(cls, number: int, meaning: str) -> "ExitCode":
        """Make a member that is the number and carries its meaning."""
        member = int.__new__(cls, number)
        member._value_ = number
        member.meaning = meaning
        return member

    DONE = 0, "done"
    BUG = 1, "a bug of ours, with its traceback"
    BAD_INPUT = 2, "bad input or configuration: one message, no traceback"
    REFUTED = (
        3,
        "a comparison failed: of exports, ranks, layouts, memory, or a claim with --strict",
    )
    # 70 and 75 follow sysexits.h: EX_SOFTWARE (here: what we run on) and EX_TEMPFAIL.
    MACHINE_FAILED = (
        70,
        "the machine failed (lost rank, killed worker, full disk); repeat the same command",
    )
    DIVERGED = 71, "the run diverged"
    HANG = 74, "the run hung; the stacks of its processes were written"
    STOPPED = 75, "stopped on request; the same command continues"
    SUPERSEDED = 76, "another process has taken over the run"
    # 128 + SIGINT, the shell's convention.
    SECOND_INTERRUPT = 130, "stopped at once by a second Ctrl-C"
    # 128 + SIGPIPE.
    NOBODY_READS = 141, "whoever read the output has ended, as `head` does"


def exit_code_table() -> str:
    """The exit codes as a Markdown table of two columns: code, meaning."""
    rows = [f"| {code.value} | {code.meaning} |" for code in ExitCode]
    return "\n".join(["| code | meaning |", "|---|---|", *rows]) + "\n"


class UserError(ValueError):
    """A mistake in what the user gave us; the message says value, rule and remedy.

    Attributes:
        exit_code: what the command ends with.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.BAD_INPUT


class ConfigError(UserError):
    """One or more things are wrong with a run configuration; the message lists all of them."""


class PrepError(UserError):
    """Data preparation was given bad input or a bad configuration."""


class CheckpointError(UserError):
    """A checkpoint cannot be saved or loaded; the message says which, why, and what remains."""


class CheckpointDamagedError(CheckpointError):
    """A checkpoint is not what was written: cut short, altered, or never completed."""


class CheckpointStorageError(CheckpointError):
    """The storage of checkpoints is full, or it fails; nothing is wrong with the run."""

    exit_code = ExitCode.MACHINE_FAILED


class UnfinishedError(CheckpointDamagedError):
    """A folder without a manifest: an attempt that was cut short, or is still being written."""


class ShardFormatError(UserError):
    """A shard folder is missing, unfinished, or not of the format that this code reads."""


class TokenizerFileError(UserError):
    """A file is not a tokenizer; the message names it."""


_NAMES = (
    *("ENOSPC", "EDQUOT", "EIO", "ESTALE", "ENODEV", "ENXIO", "ENOTCONN", "EHOSTDOWN"),
    *("EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "EREMOTEIO", "ENOLINK"),
)
#: A disk or quota is full, a device fails, a network file system lost a file or its server.
MACHINE_ERRNOS = frozenset(
    getattr(errno, name)
    for name in _NAMES
    if hasattr(errno, name)  # Linux alone has all
)


def is_machine_failure(error: BaseException) -> bool:
    """Whether an error, or its cause, says that storage is full or failing, or a connection broke.

    Nothing is wrong with what the user asked for then, and the same command may be repeated.
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, ConnectionError | TimeoutError):
            return True
        if isinstance(found, OSError) and found.errno in MACHINE_ERRNOS:
            return True
        found = found.__cause__
    return False


def exit_code_of(error: UserError) -> ExitCode:
    """What a command ends with after an error: 70 where the machine fails behind it."""
    return ExitCode.MACHINE_FAILED if is_machine_failure(error) else error.exit_code


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class MachineFailed(Exception):
    """What we run on failed: a rank, a worker, a disk; `ExitCode.MACHINE_FAILED`.

    The message names the rank and the cause.
    """


class Superseded(Exception):
    """A newer life of the run has taken over; `ExitCode.SUPERSEDED`."""


class Interrupted(BaseException):
    """A signal asked the job to stop; what is finished is kept; `ExitCode.STOPPED`.

    Like KeyboardInterrupt it is not an `Exception`: no `except Exception` takes it for a failure.
    """
