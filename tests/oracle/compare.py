"""Both trainers from the same weights on the same shards, and how far their losses part.

    python -m tests.oracle.compare SHARDS --work FOLDER [--steps 1000] [--figure losses.png]

A random `xlstm` of transformers is saved and imported (`from-hf`); `launch` trains the import with
tensor parallelism over two processes, and `tests.oracle.train` trains transformers' own model.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import yaml

ROOT = Path(__file__).parents[2]
WINDOW = 50


@dataclass(frozen=True)
class Losses:
    """What the two trainers say, in nats per token.

    Attributes:
        ours: training loss of every step.
        theirs: the same of the oracle.
        valid: loss of the whole validation split at the end, ours and the oracle's.
    """

    ours: list[float]
    theirs: list[float]
    valid: tuple[float, float]

    def differences(self) -> list[float]:
        """How far they part at each step."""
        return [abs(a - b) for a, b in zip(self.ours, self.theirs, strict=True)]

    def windows(self) -> list[float]:
        """How far the means over windows of 50 steps part."""
        return [
            abs(fmean(self.ours[at : at + WINDOW]) - fmean(self.theirs[at : at + WINDOW]))
            for at in range(0, len(self.ours), WINDOW)
        ]


def run_file(work: Path, shards: Path, steps: int, size: dict[str, int]) -> Path:
    """The run that both read; the oracle takes its keys as they stand here."""
    manifest = json.loads((shards / "manifest.json").read_text())
    run = {
        "run": {"dir": str(work / "run"), "steps": steps, "seed": 5, "init_from": str(work / "in")},
        "model": {
            "pattern": "M" * size["blocks"],
            "hidden_size": size["hidden"],
            "num_heads": size["heads"],
            "vocab_size": size["vocab"],
        },
        "layout": {"tensor": 2, "sequence": True},
        "engine": {"precision": "fp32"},
        "data": {
            "path": str(shards),
            "seq_len": manifest["row_tokens"] - 1,
            "global_batch": size["batch"],
            "micro_batch": size["batch"] // 2,
        },
        "optimizer": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "clip_grad": 1.0},
        "schedule": {"name": "cosine", "warmup_steps": 10, "min_lr_ratio": 0.1},
        "checkpoint": {"interval": steps},
        "evaluation": {"interval": steps, "max_batches": None},
        "logging": {"interval": 1, "tensorboard": False},
    }
    path = work / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def save_model(folder: Path, size: dict[str, int]) -> None:
    """A random model of transformers."""
    from transformers import xLSTMConfig, xLSTMForCausalLM

    torch.manual_seed(0)
    config = xLSTMConfig(
        vocab_size=size["vocab"],
        hidden_size=size["hidden"],
        num_hidden_layers=size["blocks"],
        num_heads=size["heads"],
    )
    xLSTMForCausalLM(config).save_pretrained(folder)


def call(python: str, *words: str | Path) -> None:
    """Run a module in the repository; what it printed is shown if it fails."""
    command = [python, "-m", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}")


def train_both(shards: Path, work: Path, steps: int, size: dict[str, int], python: str) -> Losses:
    """Train both and read what they wrote."""
    save_model(work / "hf", size)
    run = run_file(work, shards, steps, size)
    tokenizer = shards / "tokenizer"
    call(
        python, "xlstm_mcore.convert", "from-hf", work / "hf", work / "in", "--tokenizer", tokenizer
    )
    call(python, "pretrain", "launch", "--nproc", "2", run)
    call(python, "tests.oracle.train", run, work / "hf", work / "oracle.json")
    records = [json.loads(line) for line in (work / "run" / "metrics.jsonl").open()]
    oracle = json.loads((work / "oracle.json").read_text())
    ours = [record["loss"] for record in records if "loss" in record]
    (valid,) = [record["valid_loss"] for record in records if "valid_loss" in record]
    return Losses(ours, oracle["train"], (valid, oracle["valid"]))


def draw(losses: Losses, path: Path) -> None:
    """Both curves above, and how far they part below."""
    from matplotlib.figure import Figure

    figure = Figure((8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    steps = range(1, len(losses.ours) + 1)
    above.plot(steps, losses.theirs, label="transformers and plain torch", color="tab:orange", lw=3)
    above.plot(steps, losses.ours, label="this project, tensor parallel 2", color="black", lw=0.8)
    above.set_ylabel("loss (nats per token)")
    above.legend()
    below.semilogy(steps, losses.differences(), color="black", lw=0.8)
    below.set_ylabel("difference")
    below.set_xlabel("step")
    figure.savefig(path, dpi=120)


def main(words: list[str] | None = None, python: str = sys.executable) -> Losses:
    """Train both as the command line says, and print how far they part."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shards", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--figure", type=Path)
    for name, default in (("hidden", 256), ("heads", 4), ("blocks", 3), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args(words)
    manifest = json.loads((asked.shards / "manifest.json").read_text())
    size = {name: getattr(asked, name) for name in ("hidden", "heads", "blocks", "batch")}
    size["vocab"] = manifest["tokenizer"]["vocab_size"]
    asked.work.mkdir(parents=True)
    losses = train_both(asked.shards.resolve(), asked.work.resolve(), asked.steps, size, python)
    if asked.figure:
        draw(losses, asked.figure)
    print(f"largest difference of the first 100 steps: {max(losses.differences()[:100]):.1e}")
    print(f"largest difference of the means over {WINDOW} steps: {max(losses.windows()):.1e}")
    print(f"validation: {losses.valid[0]:.5f} here, {losses.valid[1]:.5f} there")
    return losses


if __name__ == "__main__":
    main()
