"""A start may have a time limit of its own, which ends it like a stop."""

import shutil
from pathlib import Path

import pytest

from pretrain import cli, layout
from pretrain.supervision.progress_file import read_progress
from xlstm_io.errors import ExitCode

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "0.1.0"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run of six steps with its third checkpoint, as the working directory."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    return tmp_path / "golden" / "run"


def train(*options):
    layout.leave()
    try:
        return cli.run(["train", "run.yaml", *options])
    finally:
        layout.leave()


def test_when_its_time_is_over_a_start_saves_and_ends(folder, capsys):
    """However short it is, every start makes a step, so that repeated starts reach the end."""
    for step in (4, 5):
        assert train("--run.max_minutes", "1e-6") == ExitCode.STOPPED
        assert f"stopped after step {step}: its time is over" in capsys.readouterr().err
        progress = read_progress(folder)
        assert (progress.status, progress.step) == ("stopped", step)
        assert progress.checkpoint_step == step
    assert train("--run.max_minutes", "60") == ExitCode.DONE
