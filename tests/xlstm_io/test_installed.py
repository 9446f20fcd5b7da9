"""A shell without the project's environment: one message, where an import would be a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "package", ["pretrain", "data_prep", "slurm", "experiments", "xlstm_mcore.convert"]
)
def test_a_python_without_the_packages_is_told_what_to_do(package):
    done = subprocess.run(
        [sys.executable, "-S", "-m", package, "--help"],  # -S: without site-packages
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {sys.executable} does not have the packages")
    assert "source .venv/bin/activate" in done.stderr
