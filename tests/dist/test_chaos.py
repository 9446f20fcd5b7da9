"""SIGKILL at random moments of training and saving, by the dozen: nothing is lost."""

import json
import random
import time

import pytest

from pretrain.checkpoint import find_latest
from pretrain.metrics import read_metrics
from tests.dist.training_runs import TrainingRun, tiny_run
from xlstm_io.checkpoint.manifest import MANIFEST_NAME, METADATA_NAME, step_folders

pytestmark = pytest.mark.dist

RANKS = 2
STEPS = 120
KILLS = 36
LIMIT_S = 120.0


def run_of(folder, data):
    return tiny_run(folder, data, run__steps=STEPS, evaluation__interval=40)


def log_of(folder):
    path = folder / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def results(folder):
    """Losses and gradient norms of all steps, and the hashes of the final checkpoint's blocks."""
    log = {record["step"]: (record["loss"], record["grad_norm"]) for record in log_of(folder)}
    blocks = json.loads((find_latest(folder) / METADATA_NAME).read_bytes())["tensors"]
    return log, {name: sorted((r[0], r[1], r[4]) for r in rows) for name, rows in blocks.items()}


def wait_for_steps(run, folder, steps):
    """Until the run has logged so many more steps, or ended."""
    last = [record["step"] for record in log_of(folder)][-1:] or [0]
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end and run.running:
        now = [record["step"] for record in log_of(folder)][-1:] or [0]
        if now[0] >= last[0] + steps:
            return
        time.sleep(0.005)


def test_dozens_of_kills_change_nothing(warm_python, shards, tmp_path, record_testsuite_property):
    rng, log = random.Random(20), tmp_path / "log.txt"
    whole = TrainingRun(warm_python, run_of(tmp_path / "whole", shards), RANKS, log)
    assert whole.wait(LIMIT_S) == [0, 0], log
    expected = results(tmp_path / "whole")

    kills = runs = 0
    unfinished = set()
    while kills < KILLS:
        folder = tmp_path / f"run-{runs}"
        while True:
            die = None
            if kills < KILLS and rng.random() < 0.4:  # inside a save, at any of its writes
                die = rng.randrange(RANKS), rng.randint(1, 20)
            run = TrainingRun(warm_python, run_of(folder, shards), RANKS, log, die)
            if kills < KILLS and die is None:  # anywhere: start-up, loading, steps, saves
                wait_for_steps(run, folder, rng.randint(0, 5))
                time.sleep(rng.uniform(0, 0.04))
                codes = run.wait(0)
            else:
                codes = run.wait(LIMIT_S)
            run.kill(rng)
            if codes == [0, 0]:
                break
            kills += 1
            unfinished |= {p for p in step_folders(folder) if not (p / MANIFEST_NAME).exists()}
        assert results(folder) == expected, f"run {runs} after {kills} kills; see {log}"
        runs += 1
    print(f"{kills} SIGKILLs, {len(unfinished)} of them while saving, {runs} runs: nothing lost")
    record_testsuite_property("sigkills", kills)
    assert kills >= KILLS and len(unfinished) >= 6
