"""A start may have a time limit of its own, which ends it like a stop; an end waits for a save."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain import cli, layout
from pretrain.engines import verdict
from pretrain.supervision.job_end import VARIABLE
from pretrain.supervision.progress_file import Progress, read_progress
from pretrain.supervision.watchdog import CHECKPOINT, STEP, Watchdog
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
    for life, step in ((1, 4), (2, 5), (3, 6)):  # each start keeps its own output
        text = (folder / "logs" / f"life-{life:06d}" / "rank_0.log").read_text()
        assert f"step {step}/6" in text and "continuing from" in text


def test_an_end_that_waits_for_a_save_is_no_hang(folder, monkeypatch):
    """A save takes longer than a step may, and its watchdog would end a run that has diverged."""
    phases, real = [], Watchdog.moved
    monkeypatch.setattr(
        Watchdog, "moved", lambda self, *now: phases.append(now) or real(self, *now)
    )
    judge = verdict.Guard.judge

    def fails_at_the_fifth(guard, loss, norm, votes=()):
        if phases[-1] == (STEP, 4):
            loss[0] = float("nan")
        return judge(guard, loss, norm, votes)

    monkeypatch.setattr(verdict.Guard, "judge", fails_at_the_fifth)
    assert train("--checkpoint.interval", "4") == ExitCode.DIVERGED
    assert phases[-2:] == [(STEP, 4), (CHECKPOINT, 4)]


def test_a_life_stops_before_its_job_ends_by_what_its_saves_take(folder, monkeypatch, capsys):
    """A minute is kept free at least; without a save so far nothing is known."""
    monkeypatch.setenv(VARIABLE, str(time.time() + 30))
    every_step = ("--checkpoint.interval", "1", "--checkpoint.asynchronous", "false")
    assert train(*every_step) == ExitCode.STOPPED
    assert "stopped after step 5: its time is over" in capsys.readouterr().err, "saved after 4"
    progress = read_progress(folder)
    assert 0 < progress.save_seconds < 30
    replace(progress, save_seconds=1800.0).write(folder)
    shutil.rmtree(progress.checkpoint)
    monkeypatch.setenv(VARIABLE, str(time.time() + 3600))
    assert train() == ExitCode.STOPPED, "an earlier life has measured it"
    assert "stopped after step 5: its time is over" in capsys.readouterr().err
    assert read_progress(folder).save_seconds < 30
    monkeypatch.setenv(VARIABLE, str(time.time() + 3600))
    assert train() == ExitCode.DONE


def test_check_compares_a_step_and_a_save_with_the_grace(folder, capsys):
    def grace(seconds):
        assert cli.run(["check", "run.yaml", "--run.grace_seconds", str(seconds)]) == 0
        out = capsys.readouterr().out
        return next(line for line in out.splitlines() if line.startswith("grace"))

    assert "known once the run has saved" in grace(30)
    Progress("running", 5, 6, 1, "ckpt", 5, step_seconds=2.0, save_seconds=20.0).write(folder)
    assert grace(30) == "grace             30 s: a step took 2.0 s and a save 20.0 s"
    assert "so a stop would be cut by the kill (run.grace_seconds=20)" in grace(20)
