"""The model's benchmarks run; their figures are measured by hand."""

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(warm_python):
    """Runs a benchmark's command."""

    def command(*words):
        done = subprocess.run(
            [warm_python.executable, "-m", *map(str, words)],
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return command


def test_train_step_beside_transformers(run, tmp_path):
    out = tmp_path / "out.json"
    small = ["--models", "large", "--rounds", 1, "--batch", 1, "--steps", 64, "--threads", 1]
    done = run("benchmarks.train_step_cpu", *small, "--json", out)
    assert done.returncode == 0, done.stderr
    seconds = json.loads(out.read_text())["large"]["seconds"]
    assert {"ours", "transformers"} <= set(seconds)
    assert "x faster (goal 1.15x" in done.stdout


def test_parity_says_when_a_model_has_not_learned_it(run, tmp_path):
    short = ["--patterns", "ss", "--steps", 10, "--batch", 8, "--json", tmp_path / "out.json"]
    done = run("benchmarks.parity", *short)
    assert done.returncode == 1, done.stderr
    assert "not as the paper says: ss" in done.stdout


def test_memory_of_an_import(run):
    done = run("benchmarks.import_memory", "--hidden", 128, "--layers", 1, "--vocab", 100)
    assert done.returncode == 0, done.stderr
    assert "every tensor equal" in done.stdout


def test_generation_beside_transformers(run, tmp_path):
    small = ["--hidden", 128, "--layers", 1, "--vocab", 96, "--batches", 1, 3]
    short = ["--prompt", 70, "--tokens", 5, "--rounds", 1, "--threads", 1]
    done = run("benchmarks.generation", *small, *short, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert [result["equal"]["tokens"] for result in results.values()] == [1, 1]
    assert "x as fast (goal of the second 1.3x" in done.stdout


def test_the_gradients_of_a_classic_block_are_summed_in_its_kernels(run, tmp_path):
    out = tmp_path / "out.json"
    classic = ["pretrain/configs/xlstm_125m_1to0.yaml", "--tokens", 256]
    done = run("benchmarks.block_roofline", *classic, "--json", out)
    assert done.returncode == 0, done.stderr
    block = json.loads(out.read_text())["block"]
    names = [kernel["name"] for kernel in block if kernel["backward"]]
    assert names.count("conv_backward") == 1
    assert names.count("add") == 0, "two gradients are summed by an operator of their own"
    assert names.count("cat") == 0, "the halves of the projection's gradient are put side by side"
    assert names.count("norm_skip_forward") == 0, "the gradient leaves the result beside it"


def test_a_step_on_many_gpus_is_counted(run):
    done = run("benchmarks.large_runs.end_to_end", "pretrain/configs/xlstm_large_164m.yaml")
    assert done.returncode == 0, done.stderr
    slow, fast = re.findall(r"messages exposed ([0-9.]+) s.* ([0-9.]+) % MFU", done.stdout)
    assert float(slow[0]) > float(fast[0]) > 0
    assert float(slow[1]) < float(fast[1]) < 100


# Of a 7B-style block of few tokens, forward and backward. It may only fall.
DISPATCHES = 139


def test_a_block_is_counted_as_it_runs(run, tmp_path):
    out = tmp_path / "out.json"
    small = ["pretrain/configs/xlstm_large_164m.yaml", "--tokens", 256]
    done = run("benchmarks.block_roofline", *small, "--json", out)
    assert done.returncode == 0, done.stderr
    assert "% MFU" in done.stdout
    block = json.loads(out.read_text())["block"]
    names = [kernel["name"] for kernel in block if not kernel["backward"]]
    # Two norms of the block and one of the heads; q, k, v, o, gates, out, gate and up, down.
    assert names.count("norm_forward") == 3 and names.count("gated_forward") == 1
    assert names.count("mm") == 5
    assert "_to_copy" not in names, "something is widened"
    backward = [kernel for kernel in block if kernel["backward"]]
    # What products need of the block's two norms is computed again, and none for its own gradient.
    # The kernels of the other gradients leave it beside these. The cell runs once more.
    names = [kernel["name"] for kernel in backward]
    assert names.count("norm_forward") == 2 and names.count("gated_forward") == 0
    assert names.count("outputs") == 1
    assert names.count("add") == 0, "the norm adds up the gradients of the residual stream"
    assert names.count("clone") == 0, "gradients of q, k and v are put in order first"
    assert names.count("addmm") == 4, "the four large weights' gradients are added by their product"
    assert names.count("addmm_") == 1, "the gradients of the tokens by two products are one sum"
    assert len(block) <= 66
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("block ")]
    assert sum(int(row[3]) for row in rows) <= DISPATCHES
