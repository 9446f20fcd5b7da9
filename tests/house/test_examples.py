"""examples/: each script runs as it stands, at a small size."""

import os
import subprocess
import sys

import pytest
import yaml

from pretrain.checkpoint import find_latest
from pretrain.config import load_config
from tests.house.documents import EXAMPLES, ROOT

SMALL = [
    *["--model.pattern", "M", "--model.hidden_size", "32", "--model.num_heads", "2"],
    *["--model.vocab_size", "400", "--data.seq_len", "64", "--data.global_batch", "4"],
    *["--data.micro_batch", "2", "--run.steps", "2", "--schedule.warmup_steps", "1"],
    *["--evaluation.max_batches", "1"],
]


def example(name, *words, code=0, **environment):
    """Output of an example; paths of its Python, and of the tree, come from here."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [str(ROOT / "examples" / name), *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": path, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.mark.parametrize("name", [n for n in EXAMPLES if n.endswith(".sh")])
def test_scripts_are_executable_and_stop_at_the_first_error(name):
    assert os.access(ROOT / name, os.X_OK)
    assert "set -euo pipefail" in (ROOT / name).read_text()


def test_a_corpus_of_ones_own(tutorial, tmp_path):
    sizes = {"OUT": str(tmp_path), "VOCAB_SIZE": "400", "SEQ_LEN": "64"}
    output = example("own_corpus.sh", tutorial.folder / "texts", **sizes)
    assert (tmp_path / "shards/manifest.json").is_file() and "200 read" in output
    assert "usage: examples/own_corpus.sh" in example("own_corpus.sh", code=2)


def test_the_run_file_reads_what_own_corpus_writes():
    config = load_config(ROOT / "examples/run.yaml")
    script = (ROOT / "examples/own_corpus.sh").read_text()
    assert config.data.path == "data/own/shards" and "OUT:-data/own}" in script
    assert f"SEQ_LEN:-{config.data.seq_len}}}" in script
    assert f"VOCAB_SIZE:-{config.model.vocab_size}}}" in script
    assert yaml.safe_load((ROOT / "examples/run.yaml").read_text())["run"]["dir"] == "runs/own"


def test_one_machine(tutorial, tmp_path):
    words = ["--data.path", tutorial.folder / "shards", "--run.dir", tmp_path / "run", *SMALL]
    output = example("one_machine.sh", "examples/run.yaml", *words, NPROC="1")
    assert "step 2/2" in output and find_latest(tmp_path / "run") is not None


def test_two_nodes_by_torchrun(tutorial, tmp_path):
    """Both "nodes" on this machine: two agents, a process each, one run."""
    words = ["--data.path", tutorial.folder / "shards", "--run.dir", tmp_path / "run", *SMALL]
    from pretrain.processes.workers import free_port

    output = example(
        "two_nodes_torchrun.sh", "examples/run.yaml", *words, MASTER_PORT=str(free_port())
    )
    assert "2 processes on cpu" in output and "step 2/2" in output
    assert find_latest(tmp_path / "run") is not None


def test_logits_of_a_checkpoint(tutorial):
    """In a process of its own, as a reader would start it."""
    done = subprocess.run(
        [sys.executable, "examples/logits.py", tutorial.folder / "runs/first", "--prompt", "def"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, *likeliest = done.stdout.splitlines()
    assert first.startswith("pattern MM, logits (1, ") and len(likeliest) == 5
