"""A rank that stands still ends the run with stacks, names and exit code 74."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from xlstm_io.errors import ExitCode

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "data" / "golden" / "0.1.0"
LIMIT_S = 500  # ends a test that hangs


def wait_for(condition):
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_a_stopped_rank_is_named_and_the_others_write_their_stacks(tmp_path):
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "golden"))
    words = ["launch", "run.yaml", "--nproc", "2", "--layout.tensor", "2", "--run.steps", "100000"]
    words += ["--guard.hang-timeout", "15", "--schedule.name", "constant"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "pretrain", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for line in launcher.stdout:
            if line.startswith("step 40"):
                break
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        noted = folder / "run" / "logs" / "phase-1.json"  # written at the watchdog's next look
        wait_for(lambda: noted.exists() and json.loads(noted.read_text())["phase"] == "step")
        second = next(pid for pid in map(int, children) if rank_of(pid) == "1")
        os.kill(second, signal.SIGSTOP)
        out, _ = launcher.communicate(timeout=LIMIT_S)  # gloo itself would wait for half an hour
        assert launcher.returncode == ExitCode.HANG, out
    finally:
        launcher.kill()
        launcher.wait()
    assert "rank 0 has made no progress for" in out and "Traceback" not in out
    assert re.search(r"rank 1 was last seen in its \w+, after step \d+", out)
    assert "trainer.py" in (folder / "run" / "logs" / "hang-0.txt").read_text()
    assert not (folder / "run" / "logs" / "hang-1.txt").exists()
    assert not Path(f"/proc/{second}").exists()


def rank_of(pid):
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((v[5:].decode() for v in variables if v.startswith(b"RANK=")), None)
