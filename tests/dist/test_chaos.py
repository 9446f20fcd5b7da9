"""SIGKILL and SIGTERM at random moments of a run, by the dozen: nothing is lost."""

import random
import re
import signal
import time

import pytest

from pretrain.checkpoint import find_latest
from tests.dist.training_runs import Signal, TrainingRun, log_of, results, tiny_run
from xlstm_io.checkpoint.evaluation import read_evaluation
from xlstm_io.checkpoint.manifest import (
    MANIFEST_NAME,
    parse_manifest,
    step_folders,
    step_of_folder,
)

pytestmark = pytest.mark.dist

RANKS = 2
STEPS = 120
KILLS = 36
LIMIT_S = 120.0


def run_of(folder, data):
    return tiny_run(folder, data, run__steps=STEPS, evaluation__interval=40)


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


def measured(folder):
    return {r["step"]: r["valid_loss"] for r in log_of(folder) if "valid_loss" in r}


# Checkpoints are rarer than evaluations: a stop must save one of its own.
MEASURED = {
    "run__steps": 16,
    "evaluation__interval": 2,
    "evaluation__max_batches": 3,
    "checkpoint__interval": 4,
    "checkpoint__asynchronous": False,
    # A rank that is stopped alone before the ranks have met is waited for so long.
    "guard__rendezvous_timeout": 60.0,
}
PORTION = 5  # moments of a test: a failing one is repeated alone, and several run side by side


def pytest_generate_tests(metafunc):
    if "portion" in metafunc.fixturenames:
        moments = metafunc.config.getoption("--moments")
        metafunc.parametrize("portion", range(-(-moments // PORTION)))


@pytest.fixture(scope="module")
def undisturbed(warm_python, shards, tmp_path_factory):
    """What a run comes to that nobody disturbs, and the seconds until its first step."""
    folder = tmp_path_factory.mktemp("undisturbed")
    log = folder / "log.txt"
    started = time.monotonic()
    run = TrainingRun(warm_python, tiny_run(folder / "whole", shards, **MEASURED), RANKS, log)
    wait_for_steps(run, folder / "whole", 1)
    start_up = time.monotonic() - started
    assert run.wait(LIMIT_S) == [0, 0], log.read_text()
    return (results(folder / "whole"), measured(folder / "whole")), start_up


def test_random_moments_of_evaluation_and_start_up_change_nothing(
    warm_python, shards, tmp_path, undisturbed, portion, request
):
    """30 of them: `python -m pytest tests/dist/test_chaos.py -k moments --moments 30`."""
    (expected, start_up), log, rng = undisturbed, tmp_path / "log.txt", random.Random(7 + portion)
    moments, runs = request.config.getoption("--moments") - portion * PORTION, 0
    moments, stops = min(moments, PORTION), 0
    while moments > 0:
        folder = tmp_path / f"run-{runs}"
        while True:
            signals = {}
            if moments > 0:
                moments -= 1
                number = (signal.SIGTERM, signal.SIGKILL)[moments % 2]
                at = {"batch": rng.randint(1, 12)}
                if moments % 4 >= 2:
                    at = {"seconds": rng.uniform(0, start_up)}
                # Both ranks, as a batch system does it, or one alone.
                signals = dict.fromkeys(rng.choice([(0, 1), (0,), (1,)]), Signal(number, **at))
            raw = tiny_run(folder, shards, **MEASURED)
            run = TrainingRun(warm_python, raw, RANKS, log, signals=signals)
            codes = run.wait(LIMIT_S)
            run.kill(rng)
            if codes == [75, 75]:
                stops += 1
                newest = find_latest(folder)
                done = [record["step"] for record in log_of(folder)][-1:] or [0]
                saved = 0 if newest is None else step_of_folder(newest)
                assert saved == done[0], f"a step is lost: {log.read_text()}"
            elif codes == [0, 0]:
                break
            elif set(codes) == {70, 75}:  # one was stopped before all had come
                assert re.search(r"had not come|could not reach rank 0", log.read_text())
            else:
                assert -signal.SIGKILL in codes, f"{codes}: {log.read_text()}"
        assert (results(folder), measured(folder)) == expected, f"run {runs}: {log.read_text()}"
        newest = find_latest(folder)
        loss = read_evaluation(newest, parse_manifest(newest)).loss
        assert loss == expected[1][16]
        runs += 1
    assert stops >= 1
