"""The files of the example sites are what is rendered today, and are bash."""

import shutil
import subprocess

import pytest

from tests.slurm.plans import EXAMPLES, NODES, ROOT, TASKS, example


def test_every_example_site_has_a_batch_file():
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(NODES)


@pytest.mark.parametrize("name", [*NODES, *TASKS])
def test_examples_are_what_is_rendered_today(name):
    """After a change on purpose: python -m tests.slurm.plans writes them again."""
    assert (EXAMPLES / f"{name}.sbatch").read_text() == example(name)


@pytest.mark.parametrize("name", [*NODES, *TASKS])
def test_batch_files_are_bash(name, tmp_path):
    path = tmp_path / "job.sbatch"
    path.write_text(example(name))
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize(
    "name", ["job/batch.sh", *(f"examples/{name}.sbatch" for name in (*NODES, *TASKS))]
)
def test_shellcheck_finds_nothing(name):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    # SC1091: the sourced file lies in the run folder. SC2154, SC2034, SC2317: what batch.sh sets
    # and calls.
    words = ["shellcheck", "-S", "warning", "-e", "SC1091,SC2154,SC2034,SC2317"]
    done = subprocess.run(
        [*words, str(ROOT / "slurm" / name)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
