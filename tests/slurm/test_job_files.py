"""Small programs of a job, each by itself: the copies of a node, and what is evaluated next."""

import os
import subprocess
import time
from pathlib import Path

import pytest

import slurm.job
from slurm.job.evaluations import QUIET_S, next_checkpoint
from slurm.job.state import RunState, State, write

STAGE = Path(str(slurm.job.__file__)).with_name("stage.sh")


def stage(*words, environment=None):
    done = subprocess.run(
        ["bash", str(STAGE), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    return done.returncode, done.stderr


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "my shards"
    for name in ("train/a.tar", "manifest.json", "_work/state"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_folder_is_copied_without_its_build_state(shards, tmp_path):
    own = tmp_path / "own disk"
    (own / "shards-0.part").mkdir(parents=True)  # of a copy that was cut short
    (own / "shards-0.part/old").touch()
    assert stage(own, shards, "shards-0", shards / "train", "shards-1") == (0, "")
    assert names(own / "shards-0") == ["manifest.json", "train/a.tar"]
    assert sorted(path.name for path in own.iterdir()) == ["shards-0", "shards-1"]
    (shards / "manifest.json").write_text("another")
    assert stage(own, shards, "shards-0") == (0, "")  # what is there is whole
    assert (own / "shards-0/manifest.json").read_text() == "manifest.json"


def test_a_copy_that_fails_leaves_nothing_and_says_so(shards, tmp_path):
    code, said = stage(tmp_path / "own", tmp_path / "nowhere", "shards-0")
    assert code == 1 and f"{tmp_path}/nowhere was not copied to" in said
    assert list((tmp_path / "own").iterdir()) == []
    # A disk that is full.
    (tmp_path / "tar").write_text('#!/bin/sh\n[ "$3" != -xf ] && exec /bin/tar "$@"; exit 2\n')
    (tmp_path / "tar").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    code, said = stage(tmp_path / "own", shards, "shards-0", environment=path)
    assert code == 1 and list((tmp_path / "own").iterdir()) == []


# Which checkpoint is evaluated next -------------------------------------------------------------


def put_checkpoint(run, step, complete=True):
    name = f"step-{step:08d}-abc"
    write(run / "checkpoints" / name / "manifest.json", {"complete": complete, "step": step})
    return name


def test_the_oldest_checkpoint_without_a_result_is_next(tmp_path):
    write(tmp_path / "progress.json", {"step": 30, "steps": 100})
    assert next_checkpoint(tmp_path) == {"CHECKPOINT": "", "RESULT": "", "AGAIN": "yes"}
    second, first = put_checkpoint(tmp_path, 20), put_checkpoint(tmp_path, 10)
    put_checkpoint(tmp_path, 5, complete=False)
    told = next_checkpoint(tmp_path)
    assert told["CHECKPOINT"] == first
    write(Path(told["RESULT"]), {})
    told = next_checkpoint(tmp_path)
    assert told["CHECKPOINT"] == second
    write(Path(told["RESULT"]), {})
    assert next_checkpoint(tmp_path)["AGAIN"] == "yes"
    write(tmp_path / "summary.json", {"steps": 100})
    assert next_checkpoint(tmp_path)["AGAIN"] == ""


def test_a_checkpoint_that_a_rewind_has_left_behind_is_not_evaluated(tmp_path):
    kept, left = put_checkpoint(tmp_path, 10), put_checkpoint(tmp_path, 20)
    write(tmp_path / "checkpoints" / "lives" / "000002.json", {"start_step": 10})
    told = next_checkpoint(tmp_path)
    assert told["CHECKPOINT"] == kept
    write(Path(told["RESULT"]), {})
    assert next_checkpoint(tmp_path)["CHECKPOINT"] == ""
    manifest = {"complete": True, "step": 20, "state": {"life": 2}}
    write(tmp_path / "checkpoints" / f"{left}2" / "manifest.json", manifest)
    assert next_checkpoint(tmp_path)["CHECKPOINT"] == f"{left}2"


def test_nobody_waits_for_a_run_that_does_not_go_on(tmp_path):
    files = RunState(tmp_path)
    write(tmp_path / "progress.json", {"step": 30, "steps": 100})
    files.save(State(verdict="the same error twice"))
    assert next_checkpoint(tmp_path)["AGAIN"] == ""
    files.save(State())
    assert next_checkpoint(tmp_path)["AGAIN"] == "yes"
    old = time.time() - QUIET_S - 60
    for path in (tmp_path / "progress.json", files.folder / "state.json", tmp_path):
        os.utime(path, (old, old))
    assert next_checkpoint(tmp_path)["AGAIN"] == ""
