"""Runs the parts one after the other, and prints the table; see the package."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TextIO

import torch

from benchmarks.gpu_proof import __doc__ as about
from benchmarks.gpu_proof.setting import Setting

# Part -> its share of the budget. What a part leaves over goes to those behind it.
PARTS = {
    "machine": 10,
    "correctness": 155,
    "times": 90,
    "steps": 110,
    "training": 45,
    "profile": 25,
    "slstm": 25,
    "sanitizer": 20,
}
ROWS = "rows.jsonl"


def run_part(name: str, setting: Setting) -> None:
    """In a process of its own: one part, its rows appended as they come."""
    module = import_module(f"benchmarks.gpu_proof.{name}")
    with open(setting.out / ROWS, "a", encoding="utf-8") as file:
        for row in module.rows(setting):
            file.write(json.dumps({"part": name, **row}) + "\n")
            file.flush()


def run_within(seconds: float, words: list[str], log: TextIO) -> str | None:
    """Run a command that has so long; what went wrong, if anything.

    Whatever it has started ends with it, or would keep the device's memory from the next part.
    """
    process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"not finished within {seconds:.0f} s; see {log.name}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"exit code {code}; see {log.name}" if code else None


def run_all(setting: Setting, budget: float) -> list[dict]:
    """Every part with its deadline; what went wrong is a row as well."""
    setting.out.mkdir(parents=True, exist_ok=True)
    file = setting.out / ROWS
    file.unlink(missing_ok=True)
    began, planned = time.monotonic(), 0.0
    for name, share in PARTS.items():
        planned += share * budget / sum(PARTS.values())
        words = [sys.executable, "-m", "benchmarks.gpu_proof", "--out", str(setting.out)]
        words += ["--part", name, *(["--dry-run"] if setting.dry else [])]
        left = max(1.0, planned - (time.monotonic() - began))
        started = time.monotonic()
        print(f"{name} ...", flush=True)
        with open(setting.out / f"{name}.log", "w", encoding="utf-8") as log:
            failure = run_within(left, words, log)
        row = {"part": name, "name": "whole part", "seconds": time.monotonic() - started}
        with open(file, "a", encoding="utf-8") as rows:
            rows.write(json.dumps(row | ({"failure": failure} if failure else {})) + "\n")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def describe(row: dict) -> str:
    """One line of the table."""
    if "failure" in row:
        return f"{row['part']:12} FAILED: {row['failure']}"
    if "left_out" in row:
        return f"{row['part']:12} {row['name']:44.44} left out: {row['left_out'][:80]}"
    words = []
    for key, value in row.items():
        if key == "ok":
            words.append("ok" if value else "WRONG")
        elif key == "errors" or key in ("part", "name", "said", "dtype"):
            continue
        elif isinstance(value, dict):
            words.append(f"{key} {value['median']:.3f}" if "median" in value else key)
        elif isinstance(value, float):
            words.append(f"{key} {value:.4g}")
        elif value is not None:
            words.append(f"{key} {value}")
    dtype = row.get("dtype", "").removeprefix("torch.")
    return f"{row['part']:12} {row['name']:44.44} {dtype:9} {'  '.join(words)}"


def main(arguments: list[str] | None = None) -> int:
    """Run everything; 0 without a GPU, 1 where something failed or is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_proof",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results go there")
    parser.add_argument("--budget", type=float, default=480, metavar="S", help="seconds in all")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    setting = Setting(chosen.out, chosen.dry_run)
    if chosen.part is not None:
        run_part(chosen.part, setting)
        return 0
    if not (chosen.dry_run or torch.cuda.is_available()):
        print("no GPU here: torch.cuda.is_available() is False. --dry-run shows what would run.")
        return 0
    rows = run_all(setting, chosen.budget)
    proof = {"dry_run": chosen.dry_run, "budget_s": chosen.budget, "rows": rows}
    (chosen.out / "proof.json").write_text(json.dumps(proof, indent=1) + "\n", encoding="utf-8")
    print("\n".join(describe(row) for row in rows))
    bad = [row for row in rows if "failure" in row or row.get("ok") is False]
    print(f"{len(rows)} rows, {len(bad)} failed or wrong; {chosen.out}/proof.json")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
