"""Part 4: the training command itself: train, save, resume, and the losses bit by bit."""

import subprocess
import sys
from collections.abc import Iterator

import yaml

from benchmarks.gpu_proof.setting import Setting
from benchmarks.loader.synthetic_shards import write_shards


def run_of(setting: Setting) -> dict:
    """The run, as a run file has it."""
    folder = setting.out / "training"
    return {
        "run": {"dir": str(folder / "run"), "steps": 20, "deterministic": True},
        "model": {
            "pattern": "M" * setting.pick(4, 2),
            "hidden_size": setting.pick(768, 64),
            "num_heads": setting.pick(4, 2),
            "vocab_size": setting.pick(50304, 256),
        },
        "engine": {"precision": "fp32" if setting.dry else "bf16"},
        "data": {
            "path": str(folder / "shards"),
            "seq_len": setting.pick(2048, 32),
            "global_batch": 4,
            "micro_batch": 2,
        },
    }


def rows(setting: Setting) -> Iterator[dict]:
    """`pretrain self-test` on synthetic shards: what it says, and its exit code."""
    run, folder = run_of(setting), setting.out / "training"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"seq_len": run["data"]["seq_len"], "vocab_size": run["model"]["vocab_size"]}
    write_shards(folder / "shards", {"random": [64]}, **sizes, valid_rows=4)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(run), encoding="utf-8")
    steps = str(setting.pick(20, 2))
    command = [sys.executable, "-m", "pretrain", "self-test", str(file), "--nproc", "1"]
    done = subprocess.run([*command, "--steps", steps], capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip().splitlines()
    row = {"name": "train, save, resume, compare", "code": done.returncode, "said": said[-12:]}
    yield row | {"ok": done.returncode == 0}
