"""Real grids, small ones: the papers' separation of the cells is seen, and a broken cell undoes it.

They run in one process that imports torch once (`grids.py`), as a worker of a large grid does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def grids(tmp_path_factory):
    """The folders that `grids.py` wrote, and what it printed."""
    out = tmp_path_factory.mktemp("experiments")
    done = subprocess.run(
        [sys.executable, "-m", "tests.experiments.grids", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=540,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def read(grids, which, file):
    out, _ = grids
    return json.loads((out / which / file).read_text())


def scaled(grids, which, measure):
    table = read(grids, which, "table.json")
    return {row["model"]: row["scaled"][measure] for row in table["best"]}


def verdict(grids, which, word):
    found = [v for v in read(grids, which, "verdict.json") if word in v["claim"]]
    assert len(found) == 1
    return found[0]


def test_parity_separates_memory_mixing_from_the_rest(grids):
    accuracy = scaled(grids, "right/parity-toy", "long")
    assert accuracy["xLSTM[0:1]"] >= 0.95 and accuracy["xLSTM[1:0]"] <= 0.1
    assert verdict(grids, "right/parity-toy", "memory mixing")["holds"] is True


def test_a_cut_of_memory_mixing_refutes_the_claim(grids):
    assert scaled(grids, "cut/parity-toy", "long")["xLSTM[0:1]"] < 0.5
    found = verdict(grids, "cut/parity-toy", "memory mixing")
    assert found["holds"] is False
    assert "parity strict: 3" in grids[1]


def test_recall_separates_matrix_memory_from_the_rest(grids):
    accuracy = scaled(grids, "right/mqar-toy", "recall")
    assert accuracy["xLSTM[1:0]"] >= 0.95 and accuracy["xLSTM[0:1]"] <= 0.1
    found = verdict(grids, "right/mqar-toy", "sLSTM is below")
    assert (
        found["measured"]["difference"] > 0.5 and found["why"] == "one seed has no standard error"
    )


def test_measurements_are_grids_too(grids):
    found = verdict(grids, "right/parallel-toy", "linear in the length")
    assert found["holds"] is not None and 0.5 < found["measured"]["slope"] < 1.6
    assert verdict(grids, "right/parallel-toy", "chunkwise form")["holds"] is True
    assert verdict(grids, "right/generation-toy", "time per token of Mamba")["holds"] is None
    (row,) = read(grids, "right/generation-toy", "table.json")["best"]
    assert row["mean"]["milliseconds"] > 0


def test_a_budget_is_spent_on_models_of_several_sizes(grids):
    table = read(grids, "right/scaling-toy", "table.json")
    rows = table["cells"]
    assert {row["status"] for row in rows} == {"done"}
    steps = [row["steps"] for row in rows]
    assert steps == sorted(steps, reverse=True) and steps[0] > 3 * steps[-1]
    assert [row["tokens"] for row in rows] == [n * 8 * 20 for n in steps]
    assert {o["budget"] for o in table["fits"]["xLSTM"]["optima"]} <= {4e8}
    assert table["fits"]["xLSTM"]["parameters"] is None
    verdicts = read(grids, "right/scaling-toy", "verdict.json")
    assert [v["holds"] for v in verdicts] == [None]
    assert (grids[0] / "right/scaling-toy/figure.png").stat().st_size > 10_000


def test_tokens_are_sorted_by_how_often_training_has_them(grids):
    """Training has about 22,000 of each of the two answers, and validation about 1,000."""
    (row,) = read(grids, "right/rare-tokens-toy", "table.json")["cells"]
    found = row["sets"]["trained"]
    assert {group["from"] for group in found["by_frequency"]} <= {8192, 16384}
    assert sum(g["answers"] for g in found["by_frequency"]) == found["answers"]
    assert "rare" not in row["measures"] and "gap" not in row["measures"]
    assert row["measures"]["frequent"] == pytest.approx(found["loss"])
    (loss,) = row["by_source"].values()
    assert loss == pytest.approx(found["loss"], rel=1e-4)


def test_a_cell_is_an_ordinary_run_with_table_and_figure_of_the_grid(grids):
    out, printed = grids
    grid = out / "right" / "parity-toy"
    assert (grid / "figure.png").stat().st_size > 10_000
    assert "| model |" in (grid / "table.md").read_text()
    (cell,) = (grid / "cells").glob("xLSTM01-*")
    assert (cell / "run.yaml").exists() and (cell / "metrics.jsonl").exists()
    assert any(cell.glob("checkpoints/step-*"))
    result = json.loads((cell / "result.json").read_text())
    assert result["sets"]["256"]["by_position"][-1]["from"] == 256
    assert result["sets"]["256"]["chance"] == 0.5
    rows = read(grids, "right/parity-toy", "table.json")["cells"]
    assert len(rows) == 6
    assert {row["status"] for row in rows} == {"done", "missing"}
    assert "not decided" in printed  # models that were not run
