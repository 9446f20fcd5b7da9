"""Two lives of a run at once: the older one ends, and what it wrote too late never counts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xlstm_io.checkpoint.manifest import find_latest, step_folders

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "data" / "golden" / "0.1.0"
LIMIT_S = 500  # ends a test that hangs; on a busy machine a start alone takes minutes
# Stands still between the look at the lease and the manifest of step 4: the worst moment.
STOP_BEFORE_MANIFEST = """
import os, signal, sys
import xlstm_io.checkpoint.writer as save
real = save.write_atomic
def write_atomic(path, data, **options):
    if path.name == "manifest.json" and "step-00000004" in str(path):
        os.kill(os.getpid(), signal.SIGSTOP)
    real(path, data, **options)
save.write_atomic = write_atomic
from pretrain.cli import run
sys.exit(run(sys.argv[1:]))
"""
TRAIN = "import sys; from pretrain.cli import run; sys.exit(run(sys.argv[1:]))"


def start(folder, script, *words):
    """One life of the golden run, which saves at every step."""
    options = ["--checkpoint.interval", "1", "--checkpoint.keep", "9", *words]
    return subprocess.Popen(
        [sys.executable, "-c", script, "train", "run.yaml", *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until_stopped(process):
    deadline = time.monotonic() + LIMIT_S
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Path(shutil.copytree(GOLDEN, tmp_path_factory.mktemp("takeover") / "run"))


def losses(folder):
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}


def test_a_life_that_wakes_too_late_saves_nothing_that_counts(folder):
    old = start(folder, STOP_BEFORE_MANIFEST)
    try:
        wait_until_stopped(old)
        refused = start(folder, TRAIN)
        out, _ = refused.communicate(timeout=LIMIT_S)
        assert refused.returncode == 2 and "is in use: life 1 (process" in out, out

        new = start(folder, TRAIN, "--take-over", "--run.steps", "5")
        out, _ = new.communicate(timeout=LIMIT_S)
        assert new.returncode == 0, out

        old.send_signal(signal.SIGCONT)
        out, _ = old.communicate(timeout=LIMIT_S)
        assert old.returncode == 76, out
        assert "superseded: life 2 (process" in out and "Traceback" not in out
    finally:
        old.kill()
        old.wait()
    late = [p for p in step_folders(folder / "run") if life_of(p) == 1 and "00000004" in p.name]
    assert len(late) == 1  # it did complete that one, and nothing was deleted
    newest = find_latest(folder / "run")
    assert life_of(newest) == 2 and "00000005" in newest.name
    expected = json.loads((GOLDEN / "losses.json").read_text())
    assert losses(folder) == pytest.approx({step: expected[str(step)] for step in (4, 5)}, abs=2e-6)


def test_the_next_life_goes_on_from_the_newer_one(folder):
    third = start(folder, TRAIN)
    out, _ = third.communicate(timeout=LIMIT_S)
    assert third.returncode == 0, out
    # Life 1 was ended in the save of step 5, before its manifest or after it.
    late = "of life 1 does not count: life 2 of the run went on from an earlier step"
    assert late in out or "step-00000005-" in out.split("continuing from")[0]
    assert "step-00000005" in out.split("continuing from")[1]
    assert sorted(losses(folder)) == [4, 5, 6]


def life_of(path):
    manifest = path / "manifest.json"
    return json.loads(manifest.read_text())["state"].get("life", 0) if manifest.exists() else None
