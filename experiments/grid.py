"""The folder of a grid, and the workers that go through its cells.

    OUT/NAME-SIZE/data/DATA/            shards
    OUT/NAME-SIZE/cells/CELL/           an ordinary run folder, with run.yaml and output.log
    OUT/NAME-SIZE/cells/CELL/settings.json  what of the definition it was begun with
    OUT/NAME-SIZE/cells/CELL/result.json   written last: a cell with it is done
    OUT/NAME-SIZE/claims/               who is at work on what

Any number of workers share a grid: the processes of one command, commands beside one another, the
elements of a Slurm array. Each takes the next cell that nobody has claimed (`experiments.claim`).
So a grid that was killed anywhere goes on when the same command is given again.

A worker imports torch once and forks a child for each cell, since the imports cost more than most
toy cells. It starts no thread of its own before, and the children compute with one thread each.
"""

import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.claim import TOUCH_S, Claim, read_json
from experiments.definition import Cell, Experiment, Size, cells_of, load, settings_of, size_of
from xlstm_io.allocator import keep_freed_memory
from xlstm_io.errors import ConfigError, ExitCode, Interrupted, MachineFailed, Superseded, UserError
from xlstm_io.signals import StopSignal, signal_at_parents_death
from xlstm_io.storage import write_atomic
from xlstm_io.terminal import counted, say

RESULT_FILE = "result.json"
OUTPUT_FILE = "output.log"
ATTEMPT_FILE = "attempt.json"
SETTINGS_FILE = "settings.json"
_LOOK_S = 0.1

#: Ends of a cell after which the same command tries it again: nothing is wrong with the cell.
_TRY_AGAIN = {ExitCode.MACHINE_FAILED, ExitCode.STOPPED, ExitCode.SUPERSEDED, ExitCode.HANG}


@dataclass(frozen=True)
class Grid:
    """One size of an experiment in its folder.

    Attributes:
        name: the experiment's name.
        experiment: its definition.
        size_name: one of `definition.SIZES`.
        size: the size's definition.
        folder: where everything lies.
    """

    name: str
    experiment: Experiment
    size_name: str
    size: Size
    folder: Path

    @classmethod
    def open(cls, name: str, size_name: str, out: Path) -> "Grid":
        """The grid of an experiment at a size, whether anything of it exists or not.

        Raises:
            ConfigError: there is no such experiment, or it has no such size.
        """
        experiment = load(name)
        size = size_of(name, experiment, size_name)
        return cls(name, experiment, size_name, size, out / f"{name}-{size_name}")

    @property
    def cells(self) -> list[Cell]:
        """All cells, whatever has been done of them."""
        return cells_of(self.size)

    def cell_folder(self, cell: Cell) -> Path:
        """The run folder of a cell."""
        return self.folder / "cells" / cell.name

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What came of a cell; None where it is not done."""
        return read_json(self.cell_folder(cell) / RESULT_FILE)

    def changed(self, cell: Cell) -> list[str]:
        """The settings that a cell was begun with and that the definition has no longer."""
        old = read_json(self.cell_folder(cell) / SETTINGS_FILE)
        if old is None:
            return []
        new = settings_of(self.experiment, self.size, cell)
        nothing = object()
        return [
            key
            for key in dict.fromkeys([*old, *new])
            if old.get(key, nothing) != new.get(key, nothing)
        ]

    def check_unchanged(self, cells: Sequence[Cell]) -> None:
        """Refuse to go on with cells that another definition began.

        Raises:
            ConfigError: there are some; two settings under one name would be one row of the table.
        """
        changed = [cell for cell in cells if self.changed(cell)]
        if changed:
            raise ConfigError(
                f"{counted(len(changed), 'cell')} of {self.folder} began with other settings than "
                f"the definition has now, such as {self.cell_folder(changed[0])} with another "
                f"{self.changed(changed[0])[0]}; give another --out, or remove their folders"
            )

    def last_attempt(self, cell: Cell) -> str | None:
        """How the newest attempt at a cell without a result ended."""
        found = read_json(self.cell_folder(cell) / ATTEMPT_FILE)
        return None if found is None else str(found.get("reason"))

    def spent(self, cell: Cell) -> float:
        """CPU seconds of the attempts at a cell that gave no result."""
        found = read_json(self.cell_folder(cell) / ATTEMPT_FILE)
        return 0.0 if found is None else float(found.get("cpu_seconds", 0.0))

    def claim(self, cell: Cell) -> Claim:
        """The claim of a cell."""
        return Claim(self.folder / "claims" / cell.name)


Body = Callable[[Grid, Cell, Path, StopSignal], dict[str, Any]]
"""What is done in a child for a cell, in its folder and until it is asked to stop: it returns the
fields of the result, or raises `Stopped`."""


def go_through(grid: Grid, cells: Sequence[Cell], body: Body, jobs: int = 1) -> int:
    """Work on cells until each is done or in the hands of others.

    Args:
        grid: the grid.
        cells: those to work on.
        body: what is done for each.
        jobs: processes that work beside one another.

    Returns:
        0, or 75 when it was asked to stop.
    """
    with StopSignal() as stop:
        if jobs == 1:
            return _work(grid, cells, body, stop)
        workers = []
        for _ in range(jobs):
            pid = os.fork()
            if pid == 0:
                signal_at_parents_death(signal.SIGTERM)
                os._exit(_shielded(lambda: _work(grid, cells, body, stop)))
            workers.append(pid)
        codes = []
        while workers:
            for pid in list(workers):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes.append(os.waitstatus_to_exitcode(status))
                    workers.remove(pid)
            if stop.requested:
                _pass_on(workers)
            time.sleep(_LOOK_S)
    bad = next((code for code in codes if code not in (0, ExitCode.STOPPED)), None)
    if bad is not None:
        raise MachineFailed(f"a worker of the grid ended with {bad}; give the same command again")
    return ExitCode.STOPPED if ExitCode.STOPPED in codes else ExitCode.DONE


def _shielded(function: Callable[[], int]) -> int:
    """The result of a function in a forked process, which must not return to its parent's code."""
    try:
        return function()
    except BaseException:
        import traceback

        traceback.print_exc()
        return ExitCode.BUG


def _work(grid: Grid, cells: Sequence[Cell], body: Body, stop: StopSignal) -> int:
    """One worker. Each cell is tried once at most."""
    for cell in cells:
        if stop.requested:
            return ExitCode.STOPPED
        if grid.result(cell) is not None:
            continue
        claim = grid.claim(cell)
        if not claim.take():
            continue
        try:
            if grid.result(cell) is None:  # done by another between the two looks
                _one(grid, cell, body, claim, stop)
        finally:
            claim.release()
    return ExitCode.STOPPED if stop.requested else ExitCode.DONE


def _one(grid: Grid, cell: Cell, body: Body, claim: Claim, stop: StopSignal) -> None:
    """Run one cell in a child and note how it ended."""
    folder = grid.cell_folder(cell)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        # Killed: the next owner of the claim must not find it at work.
        signal_at_parents_death(signal.SIGKILL)
        os._exit(_shielded(lambda: _child(grid, cell, body, folder, stop)))
    touched, told = started, False
    while True:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() - touched > TOUCH_S:
            claim.touch()
            touched = time.monotonic()
        if stop.requested and not told:
            _pass_on([pid])
            told = True
        time.sleep(_LOOK_S)
    code = os.waitstatus_to_exitcode(status)
    result = grid.result(cell)
    if result is None:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        spent = round(grid.spent(cell) + used.ru_utime + used.ru_stime, 3)
        attempt = {"reason": f"ended by {how}", "cpu_seconds": spent}
        write_atomic(folder / ATTEMPT_FILE, json.dumps(attempt).encode())
        say(f"{grid.name} {cell}: not done ({how}); see {folder / OUTPUT_FILE}")
    elif result["status"] == "failed":
        say(f"{grid.name} {cell}: failed: {result['reason']}")
    else:
        numbers = ", ".join(f"{k} {v:.4g}" for k, v in result["measures"].items())
        say(f"{grid.name} {cell}: {numbers}  ({time.monotonic() - started:.0f} s)")


def _pass_on(children: Sequence[int]) -> None:
    """Ask children to stop; they save and end with 75."""
    for pid in children:
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            continue


def _child(grid: Grid, cell: Cell, body: Body, folder: Path, stop: StopSignal) -> int:
    """A cell, in a process of its own: its output goes to a file, its result is written last."""
    output = os.open(folder / OUTPUT_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
    keep_freed_memory()  # for cells that are no runs; a run does it itself
    common = {"cell": {"model": cell.model, **cell.values}, "number": cell.number}
    if not (folder / SETTINGS_FILE).exists():
        settings = settings_of(grid.experiment, grid.size, cell)
        write_atomic(folder / SETTINGS_FILE, json.dumps(settings, indent=1).encode())
    try:
        fields = {"status": "done", **body(grid, cell, folder, stop)}
    except (Superseded, Interrupted) as error:
        print(error)
        return ExitCode.STOPPED
    except MachineFailed as error:
        print(f"error: {error}")
        return ExitCode.MACHINE_FAILED
    except Stopped:
        return ExitCode.STOPPED
    except UserError as error:
        print(f"error: {error}")
        if error.exit_code in _TRY_AGAIN:
            return error.exit_code
        fields = {"status": "failed", "reason": str(error), "exit_code": int(error.exit_code)}
    except OSError as error:  # a full disk, a share that went away
        print(f"error: {error}")
        return ExitCode.MACHINE_FAILED
    except Exception as error:
        import traceback

        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        fields = {"status": "failed", "reason": reason, "exit_code": int(ExitCode.BUG)}
    fields["date"] = datetime.date.today().isoformat()
    text = json.dumps(common | fields, indent=1)
    write_atomic(folder / RESULT_FILE, text.encode() + b"\n")
    return ExitCode.DONE


class Stopped(Exception):
    """The run of a cell was asked to stop, and has saved."""
