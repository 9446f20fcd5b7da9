"""Runs in bf16 beside the same runs in fp32: losses, gradient norms and gates, side by side.

    python -m tests.long_runs.precision SHARDS --work FOLDER [--steps 2000] [--muon]

Each pattern is trained with AdamW from the same weights on the same samples; `--muon` adds the same
with Muon. There are seven runs of each (`VARIANTS`), or those that `--variants` names:

- fp32 and bf16. Where a CPU has no instructions for bf16, products are computed in fp32 and rounded
  once, as GPUs do it (pretrain/engines/bf16_products.py).
- A control of each: mLSTM cells with chunks of half the length. That is the same computation with
  another order of sums, and looks into the cells see the same rows.
- fp32 up and down: a learning rate that is larger or smaller by 2^-9, the largest error of a
  rounding to bf16.
- bf16 states: bf16, and `memory.cell_states: bf16` too.

How far these go from their runs is what training makes of differences that mean nothing, of the
size of a rounding in fp32 and in bf16. The exit code is 3 where a run ends more
than 0.5 % from the validation loss of the one it is compared with.

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
# Each run, and the one that it is compared with.
VARIANTS: dict[str, str | None] = {
    "fp32": None,
    "fp32 control": "fp32",
    "fp32 up": "fp32",
    "fp32 down": "fp32",
    "bf16": "fp32",
    "bf16 control": "bf16",
    "bf16 states": "fp32",
}
VALID_BATCHES = 20  # the same ones for all runs
LOOKS = 5  # validation losses and looks into the cells in a run
RATE = 3e-3
NUDGES = {"up": 2**-9, "down": -(2**-9)}
GOAL = 0.005  # of the validation loss
# Means and standard deviations of a gate's pre-activations in a layer.
GATES = ("igate_mean", "igate_std", "fgate_mean", "fgate_std")


class OutOfTime(Exception):
    """The time that the command was given is over."""


@dataclass(frozen=True)
class Sizes:
    """How large the runs are, and where they start.

    Attributes:
        steps: optimizer steps.
        hidden: width of the model.
        batch: rows of a step.
        seed: of the weights and of the order of the samples.
    """

    steps: int
    hidden: int
    batch: int
    seed: int = 0

    @property
    def interval(self) -> int:
        """Steps between two validation losses."""
        return max(1, self.steps // LOOKS)


def run_file(
    folder: Path, shards: Path, pattern: str, optimizer: str, variant: str, sizes: Sizes
) -> dict[str, Any]:
    """The values of a run, with the recipe of the demo."""
    manifest = json.loads((shards / "manifest.json").read_text())
    precision, _, more = variant.partition(" ")
    seq_len = manifest["row_tokens"] - 1
    return {
        "run": {"dir": str(folder), "steps": sizes.steps, "seed": sizes.seed},
        "model": {
            "pattern": pattern,
            "hidden_size": sizes.hidden,
            "num_heads": 4,
            "chunk_size": seq_len // (8 if more == "control" else 4),
            "vocab_size": manifest["tokenizer"]["vocab_size"],
            "tie_embeddings": True,
        },
        "data": {
            "path": str(shards),
            "seq_len": seq_len,
            "global_batch": sizes.batch,
            "micro_batch": sizes.batch,
        },
        "engine": {"precision": precision},
        "memory": {"cell_states": "bf16" if more == "states" else "fp32"},
        "optimizer": {
            "name": optimizer,
            "lr": RATE * (1 + NUDGES.get(more, 0)),
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


def gates_apart(one: Result, other: Result) -> float:
    """The largest difference of a figure in `GATES` in any layer at the end."""
    pairs = ((cells, other.cells[layer]) for layer, cells in one.cells.items())
    return max((abs(a[gate] - b[gate]) for a, b in pairs for gate in GATES), default=0.0)


def side_by_side(name: str, results: dict[str, Result], sizes: Sizes) -> Iterator[str]:
    """The runs of a pattern in tables: losses and gradient norms, then the gates at the end.

    Args:
        name: of the pattern, with its optimizer.
        results: by variant.
        sizes: of all.
    """
    yield f"{name}: validation loss, and how far it is from that of the run it is compared with"
    rows = [["steps", *(word for variant in results for word in (variant, ""))]]
    for step in sorted(results["fp32"].valid):
        row = [str(step)]
        for variant, result in results.items():
            loss, other = result.valid[step], VARIANTS[variant]
            share = "" if other is None else f"{loss / results[other].valid[step] - 1:+.3%}"
            row += [f"{loss:.4f}", share]
        rows.append(row)
    yield from table(rows)
    yield f"{name}: mean gradient norm of the steps since the last row"
    rows = [["steps", *results]]
    for step in sorted(results["fp32"].valid):
        window = slice(max(0, step - sizes.interval), step)
        means = (fmean(result.norms[window]) for result in results.values())
        rows.append([str(step), *(f"{mean:.4f}" for mean in means)])
    yield from table(rows)
    if results["fp32"].cells:
        yield f"{name}: gate pre-activations at the end"
        rows = [["layer", "", *results]]
        for layer in results["fp32"].cells:
            for gate in GATES:
                values = (result.cells[layer][gate] for result in results.values())
                rows.append([str(layer), gate, *(f"{value:.3f}" for value in values)])
        yield from table(rows)
        apart = (
            f"{variant} {gates_apart(result, results[other]):.3f} from {other}"
            for variant, result in results.items()
            if (other := VARIANTS[variant]) is not None
        )
        yield f"largest difference: {', '.join(apart)}"


def compare(
    shards: Path,
    work: Path,
    patterns: Sequence[str],
    optimizers: Sequence[str],
    sizes: Sizes,
    variants: Sequence[str] = tuple(VARIANTS),
    end: float = float("inf"),
    python: str = sys.executable,
) -> dict[str, dict[str, float]]:
    """Finish all runs and print them side by side.

    Args:
        shards: what they train on.
        work: a folder that keeps the runs.
        patterns: of their blocks.
        optimizers: of each pattern.
        sizes: how large they are.
        variants: those of `VARIANTS` that are trained, each with the one it is compared with.
        end: when to stop, by the monotonic clock.
        python: the program that trains.

    Returns:
        How far the final validation loss is from that of the run it is compared with, as a share:
        by pattern with optimizer, then by variant.

    Raises:
        OutOfTime: it can go on.
    """
    work.mkdir(parents=True, exist_ok=True)
    found = {}
    for optimizer in optimizers:
        for pattern in patterns:
            results = {}
            for variant in variants:
                words = pattern.replace("*", "a"), optimizer, variant.replace(" ", "-")
                folder = work / "-".join(words)
                raw = run_file(folder, shards, pattern, optimizer, variant, sizes)
                finish(python, folder, raw, end)
                results[variant] = result_of(folder)
            name = f"{pattern} with {optimizer}"
            print(*side_by_side(name, results, sizes), "", sep="\n", flush=True)
            found[name] = {
                variant: results[variant].final / results[other].final - 1
                for variant in variants
                if (other := VARIANTS[variant]) is not None
            }
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; see its exit codes above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shards", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="a folder that keeps the runs")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--muon", action="store_true", help="the same with Muon")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    for name, default in (("steps", 2000), ("hidden", 256), ("batch", 16), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args(words)
    for variant in asked.variants:
        if (other := VARIANTS[variant]) is not None and other not in asked.variants:
            parser.error(f"{variant!r} is compared with {other!r}: name it in --variants too")
    sizes = Sizes(asked.steps, asked.hidden, asked.batch, asked.seed)
    optimizers = ("adamw", "muon") if asked.muon else ("adamw",)
    end = time.monotonic() + 60 * asked.minutes
    try:
        found = compare(
            asked.shards.resolve(),
            asked.work.resolve(),
            asked.patterns,
            optimizers,
            sizes,
            asked.variants,
            end,
        )
    except OutOfTime:
        print("stopped: repeat the command to go on")
        return ExitCode.STOPPED
    for name, shares in found.items():
        ends = (f"{key} {share:+.3%} from {VARIANTS[key]}" for key, share in shares.items())
        print(f"{name} after {sizes.steps} steps: {', '.join(ends)}")
    far = any(abs(share) > GOAL for shares in found.values() for share in shares.values())
    return ExitCode.REFUTED if far else ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
