"""A request to stop is heard from the first moment on, also while torch is being imported."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xlstm_io.errors import ExitCode

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "data" / "golden" / "0.1.0"
LIMIT_S = 500  # ends a test that hangs; on a busy machine a start alone takes minutes
# Says when the command line begins, and again when torch is about to be imported.
SCRIPT = """
import sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            print("importing torch", flush=True)
sys.meta_path.insert(0, Watch())
from pretrain.cli import run
sys.exit(run(sys.argv[1:]))
"""


def started(folder, blocked=()):
    def block():
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)

    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "train", "run.yaml", "--run.steps", "400"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=block,
    )
    assert process.stdout.readline() == "importing torch\n"
    return process


@pytest.mark.parametrize("blocked", [(), (signal.SIGUSR1,)], ids=["open", "blocked by a launcher"])
def test_a_signal_during_the_imports_gives_one_step_and_a_checkpoint(tmp_path, blocked):
    folder = shutil.copytree(GOLDEN, tmp_path / "run")
    process = started(folder, blocked)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)  # a batch system may say it twice
    out, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == ExitCode.STOPPED, out
    assert "stopped after step 4" in out and "Traceback" not in out
