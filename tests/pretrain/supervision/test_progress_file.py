"""progress.json: what it says, and that a run never starts anew by accident."""

import shutil
from pathlib import Path

import pytest

from pretrain import cli
from pretrain.commands.run.fresh import set_aside
from pretrain.supervision.progress_file import Progress, read_progress
from pretrain.trainer import Trainer
from xlstm_io.checkpoint.lives import record_start
from xlstm_io.checkpoint.manifest import find_latest, read_manifest, step_of_folder
from xlstm_io.errors import ExitCode

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "0.1.0"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run of six steps with its third checkpoint, as the working directory."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    return tmp_path / "golden" / "run"


def train(*options):
    from pretrain import layout

    layout.leave()
    try:
        return cli.run(["train", "run.yaml", *options])
    finally:
        layout.leave()


def test_what_is_written_is_read(tmp_path):
    progress = Progress("running", 7, 10, 2, "ckpt", 5, 0.5, 3.0)
    progress.write(tmp_path)
    assert read_progress(tmp_path) == progress


@pytest.mark.parametrize("text", ["", "[]", '{"step": 1}', "\xff"])
def test_a_damaged_file_says_nothing(tmp_path, text):
    (tmp_path / "progress.json").write_bytes(text.encode("latin-1"))
    assert read_progress(tmp_path) is None
    assert read_progress(tmp_path / "missing") is None


def test_a_full_disk_does_not_end_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    Progress("running", 1, 2, 1).write(tmp_path / "file")


def test_a_run_says_where_it_stands_and_does_not_start_anew(folder, capsys):
    assert train("--run.steps", "4", "--checkpoint.interval", "1") == ExitCode.DONE
    progress = read_progress(folder)
    assert (progress.status, progress.step, progress.steps, progress.life) == ("done", 4, 4, 1)
    assert progress.checkpoint_step == 4 and progress.step_seconds > 0
    shutil.move(folder / "checkpoints", folder / "elsewhere")
    assert train() == ExitCode.BAD_INPUT
    message = capsys.readouterr().err
    assert "had done 4 steps" in message and "--fresh" in message and "Traceback" not in message
    assert read_progress(folder) == progress

    assert train("--fresh", "--run.steps", "1") == ExitCode.DONE
    assert read_progress(folder).step == 1
    assert (folder.with_name("run.old-1") / "elsewhere").exists()


@pytest.mark.parametrize("restarts", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_what_is_started_again_ignores_fresh(folder, monkeypatch, restarts):
    """A job that Slurm requeued, and workers that torchrun starts again."""
    monkeypatch.setenv(restarts, "1")
    assert train("--fresh", "--run.steps", "4") == ExitCode.DONE
    assert not folder.with_name("run.old-1").exists()


@pytest.mark.parametrize(("name", "goes_on"), [("nightly", True), ("none", False)])
def test_what_torchrun_starts_again_when_nodes_come_or_go_ignores_fresh(
    folder, monkeypatch, capsys, name, goes_on
):
    """Its count of restarts is 0 then. Without --rdzv-id its name is that of all torchruns."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setattr("pretrain.cli.signal_at_parents_death", lambda number: None)
    for steps in ("1", "2"):
        assert train("--fresh", "--run.steps", steps) == ExitCode.DONE
    assert folder.with_name("run.old-2").exists() != goes_on
    said = capsys.readouterr().err
    assert ("was begun by this torchrun, by its --rdzv-id, and goes on" in said) == goes_on


def test_checkpoints_elsewhere_are_not_set_aside(folder, tmp_path, capsys):
    words = ["--fresh", "--checkpoint.dir", str(tmp_path / "elsewhere")]
    assert train(*words) == ExitCode.BAD_INPUT
    assert "give both other names" in capsys.readouterr().err
    assert folder.exists()


def test_a_run_whose_folder_was_lost_goes_on_from_its_checkpoints(folder, tmp_path):
    """Its lives are numbered on, or what it saves would count as superseded."""
    place = str(tmp_path / "elsewhere")
    for life, steps in ((1, "2"), (2, "3")):
        words = ["--run.steps", steps, "--run.dir", f"run-{life}", "--checkpoint.dir", place]
        assert train(*words) == ExitCode.DONE
        assert read_manifest(find_latest(place)).state["life"] == life
        shutil.rmtree(f"run-{life}")
    assert step_of_folder(find_latest(place)) == 3


def test_a_life_ends_when_another_run_folder_has_taken_its_checkpoints(
    folder, tmp_path, capsys, monkeypatch
):
    place, save = tmp_path / "elsewhere", Trainer._save

    def save_late(trainer, metrics):
        record_start(place, 2, 0, run=tmp_path / "other")
        save(trainer, metrics)

    monkeypatch.setattr(Trainer, "_save", save_late)
    words = ["--run.steps", "2", "--run.dir", "run-1", "--checkpoint.dir", str(place)]
    assert train(*words) == ExitCode.SUPERSEDED
    assert f"life 2 of run.dir={tmp_path / 'other'} has taken over" in capsys.readouterr().err
    assert find_latest(place) is None


def test_a_run_file_in_the_run_folder_is_not_set_aside(folder, capsys, monkeypatch):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    shutil.copy(folder.parent / "run.yaml", folder / "config.yaml")
    for command in ("train", "launch"):
        assert cli.run([command, str(folder / "config.yaml"), "--fresh"]) == ExitCode.BAD_INPUT
        assert "config.yaml lies in it; copy the run file" in capsys.readouterr().err
    assert (folder / "checkpoints").exists()


def test_a_launch_that_is_refused_leaves_the_old_run_in_its_place(folder, capsys):
    words = ["launch", "run.yaml", "--fresh", "--data.path", "nowhere"]
    assert cli.run(words) == ExitCode.BAD_INPUT
    assert "is not a folder" in capsys.readouterr().err
    assert (folder / "checkpoints").exists()


def test_a_run_folder_that_is_a_link_stays_one(tmp_path):
    """The new run goes to the same disk."""
    real = tmp_path / "large" / "run"
    real.mkdir(parents=True)
    (real / "old").touch()
    (tmp_path / "run").symlink_to(real)
    assert set_aside(tmp_path / "run") == real.with_name("run.old-1")
    assert (tmp_path / "run").is_symlink() and [*real.iterdir()] == []
    assert (real.with_name("run.old-1") / "old").exists()


def test_each_old_run_gets_a_name_of_its_own(tmp_path):
    for number in (1, 2, 3):
        (tmp_path / "run").mkdir()
        assert set_aside(tmp_path / "run") == tmp_path / f"run.old-{number}"
    assert set_aside(tmp_path / "run") is None
