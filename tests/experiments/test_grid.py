"""Workers on a grid: claims, results, ends of every kind; without torch, with cells that do little.

Each cell runs in a forked child, as in a real grid.
"""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import claim as claim_module
from experiments import cli
from experiments.definition import Cell, Experiment
from experiments.grid import Grid, Stopped, go_through
from experiments.results import table
from xlstm_io.errors import ConfigError, ExitCode, MachineFailed

ROOT = Path(__file__).parents[2]


@pytest.fixture
def grid(tmp_path):
    experiment = Experiment.model_validate(
        {
            "title": "t",
            "source": "s",
            "models": {"a": {}, "b": {}},
            "sizes": {"toy": {"about": "x", "models": ["a", "b"], "axes": {"seed": [0, 1, 2]}}},
            "claims": [],
            "figure": {"kind": "bars", "measure": "x", "label": "x"},
        }
    )
    return Grid("made", experiment, "toy", experiment.sizes["toy"], tmp_path / "made-toy")


def done(grid: Grid, cell: Cell, folder: Path, stop=None):
    with (grid.folder / "order.txt").open("a") as order:
        order.write(f"{cell.number} {os.getppid()}\n")
    return {"measures": {"x": cell.number}, "scaled": {}}


def numbers(grid):
    return sorted(int(line.split()[0]) for line in (grid.folder / "order.txt").open())


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_cell_is_done_once(grid, jobs):
    assert go_through(grid, grid.cells, done, jobs) == ExitCode.DONE
    assert numbers(grid) == list(range(6))
    assert [grid.result(cell)["measures"]["x"] for cell in grid.cells] == list(range(6))
    assert not list((grid.folder / "claims").iterdir())
    assert go_through(grid, grid.cells, done, jobs) == ExitCode.DONE
    assert numbers(grid) == list(range(6)), "a finished cell is not run again"


def test_a_failed_cell_is_a_result_with_its_reason(grid):
    def some_fail(grid, cell, folder, stop):
        if cell.number == 1:
            raise ConfigError("model.num_heads=3 does not divide")
        if cell.number == 2:
            raise KeyError("surprise")
        return done(grid, cell, folder)

    assert go_through(grid, grid.cells, some_fail) == ExitCode.DONE
    results = [grid.result(cell) for cell in grid.cells]
    assert [r["status"] for r in results] == ["done", "failed", "failed", *["done"] * 3]
    assert results[1]["reason"] == "model.num_heads=3 does not divide"
    assert results[1]["exit_code"] == 2
    assert results[2]["reason"] == "KeyError: 'surprise'"
    assert "Traceback" in (grid.cell_folder(grid.cells[2]) / "output.log").read_text()


def test_what_the_machine_did_is_tried_again_by_the_next_command(grid):
    def killed(grid, cell, folder, stop):
        if cell.number == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if cell.number == 1:
            raise MachineFailed("rank 3 is gone")
        if cell.number == 2:
            end = time.process_time() + 0.1
            while time.process_time() < end:
                pass
            raise Stopped
        return done(grid, cell, folder)

    for attempts in (1, 2):
        assert go_through(grid, grid.cells[2:3], killed) == ExitCode.DONE
        assert grid.spent(grid.cells[2]) >= 0.1 * attempts
    assert grid.spent(grid.cells[3]) == 0
    assert go_through(grid, grid.cells, killed) == ExitCode.DONE
    assert [grid.last_attempt(cell) for cell in grid.cells[:4]] == [
        "ended by signal SIGKILL",
        "ended by exit code 70",
        "ended by exit code 75",
        None,
    ]
    assert [grid.result(cell) is None for cell in grid.cells] == [True] * 3 + [False] * 3
    assert go_through(grid, grid.cells, done) == ExitCode.DONE
    assert numbers(grid) == list(range(6))


def test_a_full_disk_is_no_result_of_a_cell(grid):
    def full(grid, cell, folder, stop):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert go_through(grid, grid.cells[:1], full) == ExitCode.DONE
    assert grid.result(grid.cells[0]) is None
    assert grid.last_attempt(grid.cells[0]) == "ended by exit code 70"


def test_a_cell_that_another_definition_began_is_neither_a_row_nor_gone_on_with(grid):
    assert go_through(grid, grid.cells[:2], done) == ExitCode.DONE
    grid.check_unchanged(grid.cells)
    experiment = grid.experiment.model_copy(update={"models": {"a": {"run.steps": 9}, "b": {}}})
    now = dataclasses.replace(grid, experiment=experiment)
    assert now.changed(now.cells[0]) == ["models.run.steps"]
    with pytest.raises(ConfigError, match=r"2 cells of .* another models\.run\.steps; give"):
        now.check_unchanged(now.cells)
    now.check_unchanged(now.cells[2:])
    rows = table.make(now)["cells"]
    assert "other settings than now: models.run.steps" in rows[0]["reason"]
    assert [row["status"] for row in rows] == ["missing"] * 6
    assert [row["status"] for row in table.make(grid)["cells"]] == ["done"] * 2 + ["missing"] * 4


def test_an_element_waits_until_the_owner_shows_life_or_is_gone(grid, monkeypatch):
    """Slurm may start it again while the claim of the node that failed is still fresh."""
    monkeypatch.setattr(cli, "_body", lambda grid, cells: done)
    monkeypatch.setattr(claim_module, "STALE_S", 1.0)
    cell = grid.cells[0]
    assert grid.claim(cell).take()
    owner = grid.claim(cell).folder / "owner.json"
    owner.write_text(json.dumps(json.loads(owner.read_text()) | {"host": "failed", "pid": 1}))
    assert cli._cell(grid, cell) == ExitCode.DONE
    assert numbers(grid) == [0]


SCRIPT = """if True:
    import sys, time
    from pathlib import Path
    sys.path[:0] = {path!r}
    from tests.experiments.test_grid import grid as fixture, done, wait_for
    from experiments.grid import go_through
    grid = fixture.__wrapped__(Path(sys.argv[1]))

    def slow(grid, cell, folder, stop):
        (folder / "at-work").touch()
        if cell.number == 0 and sys.argv[3:] == ["shared"]:  # until the other process has a cell
            wait_for((grid.cell_folder(grid.cells[1]) / "at-work").exists)
        time.sleep(float(sys.argv[2]))
        return done(grid, cell, folder)

    sys.exit(go_through(grid, grid.cells, slow))
"""


def start(grid, seconds, *more):
    script = SCRIPT.format(path=[str(ROOT), str(ROOT / "kernels")])
    words = [sys.executable, "-c", script, str(grid.folder.parent), str(seconds), *more]
    return subprocess.Popen(words, cwd=ROOT)


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_processes_share_a_grid(grid):
    both = [start(grid, 0.01, "shared"), start(grid, 0.01, "shared")]
    assert [process.wait() for process in both] == [0, 0]
    assert numbers(grid) == list(range(6))
    parents = {line.split()[1] for line in (grid.folder / "order.txt").open()}
    assert len(parents) == 2, "one process did it all"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_grid_that_was_ended_goes_on(grid, number):
    process = start(grid, 0.3)
    wait_for(lambda: grid.result(grid.cells[0]) is not None)
    process.send_signal(number)
    code = process.wait()
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else ExitCode.STOPPED)
    time.sleep(0.5)  # an orphan finishes its cell, or is gone
    assert go_through(grid, grid.cells, done) == ExitCode.DONE
    assert all(grid.result(cell)["status"] == "done" for cell in grid.cells)


MAKES_DATA = """if True:
    import sys
    sys.path[:0] = {path!r}
    from experiments import cli, data
    from pretrain.commands.run import demo

    command = ["tests.experiments.slow_builder", "--out", "shards", {notes!r}]
    demo.data_commands = lambda *arguments: [[*command] for _ in range(4)]
    cli._body = data.prepare
    cli.go_through = cli._report = lambda *arguments, **options: 0
    sys.exit(cli.run(["run", "lm", "--out", {out!r}]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_who_builds_the_data_ends_with_the_grid_and_a_repetition_goes_on(tmp_path, number):
    notes, out = tmp_path / "notes", tmp_path / "out"
    path = [str(ROOT), str(ROOT / "kernels")]
    script = MAKES_DATA.format(path=path, out=str(out), notes=str(notes))
    words = [sys.executable, "-c", script]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for((notes / "at-work").exists)
    process.send_signal(number)
    process.wait()
    killed = number == signal.SIGKILL
    assert process.returncode == (-number if killed else ExitCode.STOPPED)
    wait_for((notes / "stopped").exists)
    told = process.stdout.read()
    assert killed or told.endswith("give the same command again to go on\n")
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == ExitCode.DONE, again.stderr
    assert again.stdout.count("slow_builder") == 3
    assert not list((out / "lm-toy" / "claims").iterdir())
