"""The real thing: `make pretrain` on this machine's text, stopped, continued, and misused."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.checkpoint import find_latest, read_manifest
from pretrain.config import load_config
from pretrain.watching.metrics import read_metrics
from xlstm_io.checkpoint.evaluation import read_evaluation
from xlstm_mcore.sizes.flops import training_flops

ROOT = Path(__file__).parents[2]
CONFIGS = "pretrain/configs"
pytestmark = pytest.mark.slow


def run(words, *, code=0, cwd=ROOT, **options):
    """A command's output; fails the test unless it ends with ``code``."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=900,
        **options,
    )
    assert done.returncode == code, f"exit code {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """`make pretrain STEPS=20`, once, in fresh processes: (work folder, output)."""
    folder = tmp_path_factory.mktemp("demo")
    words = ["make", "--no-print-directory", f"VENV={sys.prefix}"]
    return folder, run([*words, "pretrain", "STEPS=20", f"WORK={folder}"])


@pytest.fixture
def python(warm_python):
    """Runs `python -m ...`."""
    return lambda *words, **options: run([warm_python.executable, "-m", *words], **options)


@pytest.fixture
def make(warm_python):
    """Runs `make ...`, with forks of the warm Python."""
    words = ["make", "--no-print-directory", f"VENV={warm_python.environment}"]
    return lambda *more, **options: run([*words, *more], **options)


def test_make_pretrain_goes_through_every_stage(work):
    folder, output = work
    large = folder / "large"
    for stage in ("collect", "tokenizer", "build", "baselines", "launch", "to-hf", "generate"):
        assert f" {stage} " in output, stage
    assert "logits agree" in output
    assert "bigram, Kneser-Ney" in output
    assert "Traceback" not in output and "Warning" not in output
    for name in ("config.yaml", "metrics.jsonl", "loss.png", "sample.txt", "summary.txt"):
        assert (large / name).stat().st_size > 0, name
    assert list((large / "tensorboard").iterdir())
    summary = json.loads((large / "summary.json").read_text())
    assert summary["steps"] == 20 and summary["processes"] == 2
    assert 4e6 < summary["parameters"] < 5e6
    assert summary["peak_memory_bytes"]["sum"] < 8e9
    losses = [r["loss"] for r in read_metrics(large / "metrics.jsonl") if "loss" in r]
    assert losses[-1] < losses[0] - 1.5
    last = [r for r in read_metrics(large / "metrics.jsonl") if "tflops" in r][-1]
    flops = training_flops(load_config(large / "config.yaml").model)
    assert last["tflops"] == pytest.approx(last["tokens_per_second"] * flops / 1e12 / 2)
    assert "mfu" not in last  # nobody said what this CPU's peak is
    baselines = json.loads((folder / "data-stdlib" / "baselines.json").read_text())
    assert baselines["bigram_kneser_ney"] < baselines["bigram_add_one"] < baselines["unigram"]


def test_make_pretrain_continues(work, make):
    folder, _ = work
    corpus = folder / "data-stdlib" / "shards" / "manifest.json"
    before = corpus.stat().st_mtime_ns
    output = make("pretrain", "STEPS=22", f"WORK={folder}")
    assert "continuing from" in output and "step 22/22" in output
    assert corpus.stat().st_mtime_ns == before
    steps = [r["step"] for r in read_metrics(folder / "large" / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == 22


def test_classic_model_and_its_export(work, make):
    folder, _ = work
    output = make("pretrain", "MODEL=classic", "STEPS=4", f"WORK={folder}")
    assert "tensors and logits agree" in output
    assert "this model" in output


def test_commands_on_a_finished_run(work, python, warm_python):
    """Commands that README shows, on the demo's own run."""
    folder, _ = work
    large = folder / "large"
    assert "4,514,328" in python("pretrain", "show", large)
    assert "nats per token" in python("pretrain", "evaluate", large, large / "config.yaml")
    words = ["pretrain", "generate", large, "--prompt", "def ", "--max-tokens", "8"]
    text = python(*words, "--temperature", "0")
    assert text.startswith('--- prompt "def "') and "Traceback" not in text
    torchrun = [
        warm_python.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
    ]
    assert text in run([*torchrun, "-m", *words, "--temperature", "0"])
    shards = folder / "data-stdlib" / "shards"
    python("data_prep", "verify", shards, "--full")
    assert "document" in python("data_prep", "inspect", shards, "--row", "3")
    assert "steps" in python("pretrain", "report", large)


def test_a_copy_of_the_demos_run_file_works_as_the_readme_says(work, python, tmp_path):
    """`cp`, `check`, `launch`, in a folder where `make pretrain` has run."""
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "data-stdlib").symlink_to(work[0] / "data-stdlib")
    shutil.copy(ROOT / CONFIGS / "cpu_demo.yaml", tmp_path / "my.yaml")
    assert "parameters" in python("pretrain", "check", "my.yaml", cwd=tmp_path)
    short = ["--run.steps", "1", "--schedule.warmup_steps", "1", "--evaluation.max_batches", "1"]
    assert "step 1/1" in python("pretrain", "launch", "my.yaml", *short, cwd=tmp_path)


def small_run(folder, work, *more):
    """Words that train a tiny model on the demo's shards."""
    return [
        *["pretrain", "launch", f"{CONFIGS}/cpu_demo.yaml", "--nproc", "2"],
        *["--run.dir", folder, "--data.path", work / "data-stdlib" / "shards"],
        *["--model.pattern", "M", "--model.hidden_size", "64", "--model.num_heads", "2"],
        *["--data.global_batch", "4", "--data.micro_batch", "2", "--evaluation.max_batches", "1"],
        *["--schedule.warmup_steps", "2", "--logging.interval", "1", *more],
    ]


def losses(folder):
    return {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r}


def test_stop_and_resume_at_random_moments_loses_nothing(work, warm_python, python, tmp_path):
    """SIGTERM, then the same command again, until done: the same losses as without a stop."""
    data, steps = work[0], ["--run.steps", "40"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    python(*small_run(whole, data, *steps))
    rng = random.Random(0)
    stops = 0
    for attempt in range(12):
        # Signals meet fresh processes; an attempt that nobody stops may be a fork.
        executable = sys.executable if attempt < 2 else warm_python.executable
        process = subprocess.Popen(
            [executable, "-m", *map(str, small_run(stopped, data, *steps))],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if attempt < 2:  # later attempts run to the end
            seen = 0
            limit = rng.randint(2, 9)
            for line in process.stdout:
                seen += line.startswith("step ")
                if seen == limit:
                    process.send_signal(rng.choice([signal.SIGTERM, signal.SIGINT]))
                    break
        output = process.communicate(timeout=300)[0]
        if process.returncode == 0:
            break
        assert process.returncode == 75, output
        stops += 1
    assert stops == 2 and process.returncode == 0
    assert losses(stopped) == losses(whole)
    both = whole, stopped
    a, b = (read_manifest(find_latest(folder)) for folder in both)
    assert a.state["cursor"] == b.state["cursor"] and a.step == b.step == 40
    a, b = (read_evaluation(path, read_manifest(path)) for path in map(find_latest, both))
    assert a is not None and a == b


def test_killed_run_goes_on_from_its_checkpoint(work, python, tmp_path):
    """SIGKILL of every process between checkpoints."""
    data, folder = work[0], tmp_path / "run"
    words = small_run(folder, data, "--run.steps", "12", "--checkpoint.interval", "4")
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.startswith("step 6/"):
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    time.sleep(0.5)
    output = python(*words)
    assert "continuing from" in output and "step-00000004" in output
    assert sorted(losses(folder)) == list(range(1, 13))


def test_the_self_test_as_the_documents_show_it(work, python, tmp_path):
    words = small_run(tmp_path / "run", work[0], "--run.steps", "20", "--steps", "4")
    path = words[2]
    output = python("pretrain", "self-test", path, *words[3:])
    assert "resume self-test passed: 4 steps" in output


def test_train_runs_under_torchrun(work, python, tmp_path):
    words = small_run(tmp_path / "run", work[0], "--run.steps", "2")
    assert words[:2] == ["pretrain", "launch"]
    output = python(
        "torch.distributed.run",
        *["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"],
        *["-m", "pretrain", "train", words[2], *words[5:]],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "step 2/2" in output
    assert find_latest(tmp_path / "run") is not None


class TestMisuse:
    """One clear message, exit code 2, and everything as it was."""

    @pytest.fixture
    def refused(self, python):
        """Runs a command that must be refused with these words."""

        def command(*words, match):
            message = python(*words, code=2)
            assert "Traceback" not in message
            assert match in message, message

        return command

    def test_missing_data(self, make, python, tmp_path):
        output = make("pretrain", "DATA=no/such/file*.txt", f"WORK={tmp_path}", code=2)
        assert "no/such/file*.txt" in output and "Traceback" not in output
        python("pretrain", "demo", "--data", "no/such", "--work", tmp_path / "w", code=2)

    def test_empty_and_too_small_data(self, refused, tmp_path):
        empty = tmp_path / "empty"
        empty.mkdir()
        refused("pretrain", "demo", "--data", empty, "--work", tmp_path / "a", match="empty")
        small = tmp_path / "small"
        small.mkdir()
        for number in range(30):
            (small / f"{number}.txt").write_text(f"document {number} has few words\n" * 3)
        refused("pretrain", "demo", "--data", small, "--work", tmp_path / "b", match="vocab")

    def test_a_typo_and_then_a_bad_layout_are_one_message_each(self, python, tmp_path):
        text = (ROOT / CONFIGS / "cpu_demo.yaml").read_text()
        path = tmp_path / "run.yaml"
        path.write_text(text.replace("tensor: 2", "tensor: 3").replace("lr: 3", "lrr: 3"))
        message = python("pretrain", "launch", path, code=2)
        assert "optimizer.lrr" in message and "did you mean" in message
        assert "Traceback" not in message
        path.write_text(text.replace("tensor: 2", "tensor: 3"))
        message = python("pretrain", "launch", path, code=2)
        assert "layout.tensor=3" in message and "Traceback" not in message

    def test_checkpoint_of_another_model(self, work, refused, tmp_path):
        folder = work[0] / "large"
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
        refused(
            *["pretrain", "launch", f"{CONFIGS}/cpu_demo.yaml", "--nproc", "2"],
            *["--run.dir", folder, "--data.path", work[0] / "data-stdlib" / "shards"],
            *["--run.steps", "30", "--model.hidden_size", "128"],
            match="model.hidden_size: checkpoint 256, run 128",
        )
        after = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
        changed = {p.name for p in before if before[p] != after.get(p)}
        assert changed <= {"lease.json", "phase-0.json", "phase-1.json"}
        assert load_config(folder / "config.yaml").model.hidden_size == 256

    def test_fewer_steps_than_done(self, work, refused):
        refused(
            *["pretrain", "launch", work[0] / "large" / "config.yaml", "--run.steps", "5"],
            *["--schedule.warmup_steps", "1"],
            match="run.steps=5, but",
        )

    def test_triton_without_a_gpu(self, work, refused, tmp_path):
        refused(
            *small_run(tmp_path / "run", work[0], "--run.steps", "4"),
            *["--model.kernel_backend", "triton"],
            match="model.kernel_backend=triton needs a GPU",
        )

    def test_no_shards(self, refused, tmp_path):
        refused(
            *["pretrain", "launch", f"{CONFIGS}/cpu_demo.yaml", "--run.dir", tmp_path / "run"],
            *["--data.path", tmp_path],
            match=str(tmp_path),
        )

    def test_shards_of_another_length(self, work, refused, tmp_path):
        refused(
            *small_run(tmp_path / "run", work[0], "--run.steps", "2", "--data.seq_len", "128"),
            match="data.seq_len=128",
        )

    def test_diverged_run_stops_and_says_so(self, work, python, tmp_path):
        message = python(
            *small_run(tmp_path / "run", work[0], "--run.steps", "60"),
            *["--optimizer.lr", "1e25", "--optimizer.clip_grad", "0"],
            code=71,
        )
        assert "not finite" in message and "Traceback" not in message
        assert "there is no checkpoint yet" in message
        assert "lower optimizer.lr=1e+25, or clip gradients" in message
