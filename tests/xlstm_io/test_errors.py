"""One family of errors that a user can cause, and one table of exit codes."""

import ast
import errno
import pickle
import re
import runpy
from pathlib import Path

import pytest

from xlstm_io import errors
from xlstm_io.errors import ExitCode, UserError, exit_code_table

ROOT = Path(__file__).parents[2]
PACKAGES = ("xlstm_io", "xlstm_mcore", "pretrain", "data_prep", "slurm", "experiments")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
# What is not a user's mistake, and why.
OTHERS = {
    "Interrupted": "a request to stop",
    "Superseded": "another process does the work",
    "MachineFailed": "a rank, a worker or a disk failed",
    "Stopped": "the run of a cell of a grid was asked to stop, and has saved",
    "Bad": "a check of `slurm.job.preflight` has found a bad node",
}


def error_classes():
    """(name, names of its bases, file) of every exception class of the product."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                if any(re.search(r"(Error|Exception)$", base) for base in bases):
                    yield node.name, bases, path


def test_every_error_of_a_user_derives_from_the_one_base():
    """Nothing but `UserError` itself derives from a built-in exception."""
    found = {name: bases for name, bases, _ in error_classes()}
    assert {"ConfigError", "CorruptShardError", "ConvertError", "DataError"} <= set(found)
    for name, bases, path in error_classes():
        if name in OTHERS or name == "UserError":
            continue
        (base,) = bases
        while base in found and base != "UserError":
            (base,) = found[base]
        assert base == "UserError", f"{path}: {name} derives from {base}"


def test_the_families_of_checkpoints_are_one():
    assert issubclass(errors.UnfinishedError, errors.CheckpointDamagedError)
    assert issubclass(errors.CheckpointDamagedError, errors.CheckpointError)


@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "ENOTCONN", "EHOSTDOWN", "ENODEV", "EREMOTEIO"])
def test_storage_that_loses_its_server_is_a_failure_of_the_machine(name):
    """And no bad input, after which a run on Slurm is given up."""
    assert errors.is_machine_failure(OSError(getattr(errno, name), "x"))
    assert not errors.is_machine_failure(OSError(errno.EACCES, "x"))


def test_a_system_that_lacks_some_of_the_numbers_will_do(monkeypatch):
    """EREMOTEIO is Linux's alone."""
    monkeypatch.delattr(errno, "EREMOTEIO")
    numbers = runpy.run_path(errors.__file__)["MACHINE_ERRNOS"]
    assert errno.EIO in numbers and len(numbers) == len(errors.MACHINE_ERRNOS) - 1


@pytest.mark.parametrize("name", [n for n in dir(errors) if n.endswith("Error")])
def test_errors_travel_between_processes(name):
    error = getattr(errors, name)("the value, the rule, the remedy")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error)
    assert isinstance(again, UserError)


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        (OSError(errno.EIO, "Input/output error", "manifest.json"), 70),
        (OSError(errno.ESTALE, "Stale file handle", "manifest.json"), 70),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 70),
        (PermissionError(errno.EACCES, "Permission denied", "manifest.json"), 2),
        (KeyError("step"), 2),
        (None, 2),
    ],
)
def test_storage_that_fails_behind_a_message_is_the_machine(cause, code):
    try:
        raise errors.ShardFormatError("manifest.json cannot be read") from cause
    except UserError as error:
        assert errors.exit_code_of(error) == code


def test_exit_codes_are_numbers_with_a_meaning():
    expected = {0, 1, 2, 3, 70, 71, 74, 75, 76, 130, 141}
    assert {int(code) for code in ExitCode} == expected
    assert all(code.meaning and "\n" not in code.meaning for code in ExitCode)
    assert ExitCode(75) is ExitCode.STOPPED and f"{ExitCode.STOPPED}" == "75"


def test_every_code_is_returned_by_a_command():
    text = "\n".join(
        path.read_text(encoding="utf-8") for path in SOURCES if path.name != "errors.py"
    )
    for code in ExitCode:
        if code is not ExitCode.BUG:  # Python itself returns it with the traceback
            assert f"ExitCode.{code.name}" in text


def test_the_table_lists_every_code_once():
    rows = exit_code_table().splitlines()
    assert rows[:2] == ["| code | meaning |", "|---|---|"]
    assert [int(row.split("|")[1]) for row in rows[2:]] == [int(code) for code in ExitCode]
    for row, code in zip(rows[2:], ExitCode, strict=True):
        assert code.meaning in row
