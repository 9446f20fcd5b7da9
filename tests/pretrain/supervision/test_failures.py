"""A failing machine is one message with rank and cause, and exit code 70."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from pretrain.supervision.failures import machine_failure
from xlstm_io.errors import CheckpointError, ExitCode, MachineFailed

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "data" / "golden" / "0.1.0"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("[/w/third_party/gloo/gloo/transport/tcp/pair.cc:554] Connection closed"),
            "rank 3 lost the connection to another rank",
        ),
        (dist.DistBackendError("NCCL error: ncclRemoteError"), "rank 3 lost the connection"),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), "rank 3 lost the connection"),
        (
            RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"),
            "rank 3: a worker process of the loader was killed",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "rank 3: [Errno 28] No space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), "rank 3: [Errno 122] Disk quota"),
        (ConnectionResetError("by peer"), "rank 3: by peer"),
    ],
)
def test_the_machine_is_named(error, words):
    failure = machine_failure(error, 3)
    assert isinstance(failure, MachineFailed) and words in str(failure)
    assert "\n" not in str(failure)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        dist.DistBackendError("NCCL error: ncclInvalidUsage"),
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        CheckpointError("belongs to another run"),
        KeyError("x"),
    ],
)
def test_a_mistake_or_a_bug_is_not_the_machine(error):
    assert machine_failure(error, 3) is None


# What goes wrong, in one process that trains the golden run.
SCRIPT = """
import os, sys, time
import pretrain.layout
# As a communicator whose other rank is gone: to destroy it waits for that rank.
pretrain.layout.leave = lambda: time.sleep(600)
{fault}
from pretrain.cli import main
sys.argv = ["pretrain", "train", "run.yaml", *sys.argv[1:]]
main()
"""
FULL = """
import errno
def full(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the/file")
"""
REMOVED = """
import shutil
import pretrain.trainer as trainer
real, steps = trainer.train_step, []
def train_step(*args):
    steps.append(1)
    if len(steps) == 2:
        shutil.rmtree("run")
    return real(*args)
trainer.train_step = train_step
"""
LOG = FULL + "import pretrain.watching.metrics; pretrain.watching.metrics.MetricLogger.log = full"
SAVE = FULL + "import xlstm_io.checkpoint.writer as save; save.write_safetensors = full"
CONFIG = FULL + "import pretrain.trainer; pretrain.trainer.save_config = full"
CACHE = FULL + "import pretrain.data.plan as plan; plan.DataPlan.read = full"
SAVED = "the run has saved run/checkpoints/step-00000006"
BUG = "import pretrain.trainer; pretrain.trainer.train_step = lambda *a: 1 / 0"
WORKER = """
import signal, threading
from pretrain.data.plan import DataPlan
real, parent = DataPlan.read, os.getpid()
def read(*args):
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
DataPlan.read = read
"""
STANDING = """
import signal
from pretrain.data.plan import DataPlan
real, parent, reads = DataPlan.read, os.getpid(), []
def read(*args):
    reads.append(1)
    if os.getpid() != parent and len(reads) == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    return real(*args)
DataPlan.read = read
"""

WATCHED = ("--data.workers=1", "--guard.hang-timeout=5")


@pytest.mark.parametrize(
    ("fault", "code", "words", "options"),
    [
        (LOG, ExitCode.MACHINE_FAILED, "error: rank 0: [Errno 28] No space left on device", ()),
        (REMOVED, ExitCode.MACHINE_FAILED, SAVED, ("--run.steps=9",)),
        (SAVE, ExitCode.MACHINE_FAILED, "error: saving the checkpoint of step 6 failed", ()),
        (CONFIG, ExitCode.MACHINE_FAILED, "error: writing to run.dir=run failed: [Errno 28]", ()),
        (CACHE, ExitCode.MACHINE_FAILED, "error: rank 0: [Errno 28] No space", ()),
        (WORKER, ExitCode.MACHINE_FAILED, "error: rank 0: a worker process", ("--data.workers=1",)),
        (STANDING, ExitCode.HANG, "(stopped); its stacks are in run/logs/hang-0.txt", WATCHED),
        (BUG, ExitCode.BUG, "ZeroDivisionError", ()),
    ],
    ids=[
        "log",
        "folder removed",
        "checkpoint",
        "configuration",
        "cache",
        "loader worker",
        "loader worker that stands still",
        "bug",
    ],
)
def test_an_error_ends_the_process_with_its_last_words(tmp_path, fault, code, words, options):
    """And without waiting for a rank that may be gone."""
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "golden"))
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(fault=fault), *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,  # less than `leave` would wait
    )
    text = child.stdout + child.stderr
    assert child.returncode == code, text
    assert words in text
    assert ("Traceback" in text) == (code == ExitCode.BUG), text
    saved = {path.parent.name for path in folder.glob("run/checkpoints/*/manifest.json")}
    if "has saved" in words:
        assert any(name.startswith("step-00000006") for name in saved)


def test_a_killed_rank_is_named_and_the_same_command_goes_on(tmp_path):
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "golden"))
    words = ["launch", "run.yaml", "--nproc", "2", "--layout.tensor", "2", "--checkpoint.interval"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "pretrain", *words, "1", "--run.steps", "100000"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for line in launcher.stdout:
            if line.startswith("step 5"):
                break
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        second = next(pid for pid in map(int, children) if rank_of(pid) == "1")
        os.kill(second, signal.SIGKILL)
        out, _ = launcher.communicate(timeout=500)
        assert launcher.returncode == ExitCode.MACHINE_FAILED, out
    finally:
        launcher.kill()
        launcher.wait()
    assert "Traceback" not in out
    assert "rank 1 was killed by SIGKILL" in out
    assert "error: rank 0 lost the connection to another rank" in out
    assert "the same command may be repeated" in out


def rank_of(pid):
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((v[5:].decode() for v in variables if v.startswith(b"RANK=")), None)
