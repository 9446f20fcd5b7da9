"""Runs in bf16 beside the same runs in fp32: losses, gradient norms and gates, side by side.

    python -m tests.long_runs.precision SHARDS --work FOLDER [--steps 2000] [--muon]

Each pattern is trained with AdamW in fp32 and in bf16, from the same weights on the same samples;
`--muon` adds the same with Muon. Where a CPU has no instructions for bf16, products are computed in
fp32 and rounded once, as GPUs do it (pretrain/engines/bf16_products.py). The exit code is 3 where a
run in bf16 ends more than 0.5 % from the validation loss of fp32.

Runs that are finished are not repeated, and one that was stopped goes on: `--minutes M` ends the
command after so long, with exit code 75.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from pretrain.rehearsal.report import table
from pretrain.supervision.progress_file import read_progress
from pretrain.watching.metrics import read_metrics
from xlstm_io.errors import ExitCode

ROOT = Path(__file__).parents[2]
PATTERNS = ("MMM", "mmsm", "MM*")
PRECISIONS = ("fp32", "bf16")
VALID_BATCHES = 20  # the same ones for both precisions
LOOKS = 5  # validation losses and looks into the cells in a run
GOAL = 0.005  # of the validation loss
GATES = ("igate_mean", "igate_std", "fgate_mean", "fgate_std")


class OutOfTime(Exception):
    """The time that the command was given is over."""


@dataclass(frozen=True)
class Sizes:
    """How large the runs are.

    Attributes:
        steps: optimizer steps.
        hidden: width of the model.
        batch: rows of a step.
    """

    steps: int
    hidden: int
    batch: int

    @property
    def interval(self) -> int:
        """Steps between two validation losses."""
        return max(1, self.steps // LOOKS)


def run_file(
    folder: Path, shards: Path, pattern: str, optimizer: str, precision: str, sizes: Sizes
) -> dict[str, Any]:
    """The values of a run, with the recipe of the demo."""
    manifest = json.loads((shards / "manifest.json").read_text())
    return {
        "run": {"dir": str(folder), "steps": sizes.steps, "seed": 0},
        "model": {
            "pattern": pattern,
            "hidden_size": sizes.hidden,
            "num_heads": 4,
            "vocab_size": manifest["tokenizer"]["vocab_size"],
            "tie_embeddings": True,
        },
        "engine": {"precision": precision},
        "data": {
            "path": str(shards),
            "seq_len": manifest["row_tokens"] - 1,
            "global_batch": sizes.batch,
            "micro_batch": sizes.batch,
        },
        "optimizer": {
            "name": optimizer,
            "lr": 3e-3,
            "betas": [0.9, 0.95],
            "weight_decay": 0.1,
            "clip_grad": 1.0,
        },
        "schedule": {"name": "cosine", "warmup_steps": 10, "min_lr_ratio": 0.1},
        "checkpoint": {"interval": max(50, sizes.interval), "keep": 1},
        "evaluation": {"interval": sizes.interval, "max_batches": VALID_BATCHES},
        "logging": {"interval": 1, "cells": sizes.interval, "tensorboard": False},
    }


def finish(python: str, folder: Path, raw: dict[str, Any], end: float) -> None:
    """Train a run to its last step, if it is not there yet.

    Args:
        python: the program that trains.
        folder: of the run.
        raw: values of its run file.
        end: when to stop, by the monotonic clock.

    Raises:
        OutOfTime: the run has saved and can go on.
        RuntimeError: the run has failed.
    """
    progress = read_progress(folder)
    if progress is not None and progress.status == "done":
        return
    run_yaml = folder.with_suffix(".yaml")
    run_yaml.write_text(yaml.safe_dump(raw))
    with folder.with_suffix(".log").open("ab") as log:
        words = [python, "-m", "pretrain", "train", str(run_yaml)]
        process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)
        try:
            code = process.wait(max(0.0, end - time.monotonic()) if end < float("inf") else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            code = process.wait()
    if code == ExitCode.STOPPED:
        raise OutOfTime
    if code:
        raise RuntimeError(f"{' '.join(words)}: exit code {code}; see {log.name}")


@dataclass(frozen=True)
class Result:
    """What is on record of a run.

    Attributes:
        valid: validation loss by step, in nats.
        norms: gradient norm of each step.
        cells: figures of each layer that has a cell, at the last look.
    """

    valid: dict[int, float]
    norms: list[float]
    cells: dict[int, dict[str, float]]

    @property
    def final(self) -> float:
        """The validation loss at the end."""
        return self.valid[max(self.valid)]


def result_of(folder: Path) -> Result:
    """Read a finished run."""
    records = read_metrics(folder / "metrics.jsonl")
    looks = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    last = max(look["step"] for look in looks)
    return Result(
        {one["step"]: one["valid_loss"] for one in records if "valid_loss" in one},
        [one["grad_norm"] for one in records if "grad_norm" in one],
        {x["layer"]: x for x in looks if x["step"] == last and "igate_mean" in x},
    )


def side_by_side(name: str, one: Result, other: Result, sizes: Sizes) -> Iterator[str]:
    """Both runs in tables: losses and gradient norms over the run, then the gates at its end.

    Args:
        name: of the pair.
        one: fp32.
        other: bf16.
        sizes: of both.
    """
    rows = [["steps", "valid fp32", "valid bf16", "", "grad norm fp32", "grad norm bf16"]]
    for step in sorted(one.valid):
        window = slice(max(0, step - sizes.interval), step)
        norms = [f"{fmean(result.norms[window]):.4f}" for result in (one, other)]
        losses = [result.valid[step] for result in (one, other)]
        rows.append(
            [
                str(step),
                *(f"{loss:.4f}" for loss in losses),
                f"{losses[1] / losses[0] - 1:+.3%}",
                *norms,
            ]
        )
    yield f"{name}: validation loss, and mean gradient norm of the steps before it"
    yield from table(rows)
    if one.cells:
        yield f"{name}: gate pre-activations at the end, fp32 and bf16"
        rows = [["layer", *(word for gate in GATES for word in (gate, "bf16"))]]
        for layer, cells in one.cells.items():
            pairs = ((cells[gate], other.cells[layer][gate]) for gate in GATES)
            rows.append([str(layer), *(f"{value:.3f}" for pair in pairs for value in pair)])
        yield from table(rows)


def compare(
    shards: Path,
    work: Path,
    patterns: Sequence[str],
    optimizers: Sequence[str],
    sizes: Sizes,
    end: float = float("inf"),
    python: str = sys.executable,
) -> dict[str, float]:
    """Finish all runs and print them side by side.

    Args:
        shards: what they train on.
        work: a folder that keeps the runs.
        patterns: of their blocks.
        optimizers: of each pattern.
        sizes: how large they are.
        end: when to stop, by the monotonic clock.
        python: the program that trains.

    Returns:
        How far bf16's final validation loss is from fp32's, as a share, by pattern and optimizer.

    Raises:
        OutOfTime: it can go on.
    """
    work.mkdir(parents=True, exist_ok=True)
    found = {}
    for optimizer in optimizers:
        for pattern in patterns:
            results = []
            for precision in PRECISIONS:
                folder = work / f"{pattern.replace('*', 'a')}-{optimizer}-{precision}"
                raw = run_file(folder, shards, pattern, optimizer, precision, sizes)
                finish(python, folder, raw, end)
                results.append(result_of(folder))
            name = f"{pattern} with {optimizer}"
            print(*side_by_side(name, *results, sizes), "", sep="\n", flush=True)
            found[name] = results[1].final / results[0].final - 1
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; see its exit codes above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shards", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="a folder that keeps the runs")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--muon", action="store_true", help="the same with Muon")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    for name, default in (("steps", 2000), ("hidden", 256), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args(words)
    sizes = Sizes(asked.steps, asked.hidden, asked.batch)
    optimizers = ("adamw", "muon") if asked.muon else ("adamw",)
    end = time.monotonic() + 60 * asked.minutes
    try:
        found = compare(
            asked.shards.resolve(), asked.work.resolve(), asked.patterns, optimizers, sizes, end
        )
    except OutOfTime:
        print("stopped: repeat the command to go on")
        return ExitCode.STOPPED
    for name, share in found.items():
        print(f"{name}: bf16 ends {share:+.3%} from fp32 after {sizes.steps} steps")
    return ExitCode.REFUTED if any(abs(share) > GOAL for share in found.values()) else ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
