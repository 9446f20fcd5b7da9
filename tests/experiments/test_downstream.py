"""The experiment over finished runs: what it asks the harness, and makes of the answers."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import pretrain.evaluation
from experiments import cli
from experiments.cells import downstream
from experiments.grid import Grid
from experiments.results import table

TASKS = ["lambada_openai", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande"]
NORMALIZED = {"hellaswag", "arc_challenge"}


@pytest.fixture
def harness(monkeypatch):
    """A harness whose accuracies depend on the run's name; the calls it gets."""
    calls = []

    def main(checkpoint, tasks, *, precision, out):
        calls.append((checkpoint, precision))
        right = 0.6 if "xlstm" in checkpoint else 0.5
        results = {}
        for task in tasks:
            asked, other = "acc,none", "acc_norm,none"
            if task in NORMALIZED:
                asked, other = other, asked
            results[task] = {asked: right, other: 0.9}
        Path(out).write_text(json.dumps({"results": results}))
        return 0

    fake = SimpleNamespace(main=main)
    monkeypatch.setitem(sys.modules, "pretrain.evaluation.harness", fake)
    monkeypatch.setattr(pretrain.evaluation, "harness", fake, raising=False)
    monkeypatch.setattr(downstream, "find_spec", lambda name: True)
    return calls


def words(*models):
    chosen = [word for model in models for word in ("--only", f"model={model}")]
    return ["run", "downstream", "--size", "paper", *chosen, "--only", "shape=125m"]


def test_accuracies_become_a_table_and_verdicts(harness, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    both = ("xLSTM[1:0]", "Transformer")
    grid = Grid.open("downstream", "paper", Path("out"))
    for cell in grid.cells:
        if cell.model in both:
            folder = grid.cell_folder(cell)
            folder.mkdir(parents=True)
            found = {"status": "done", **downstream.body(grid, cell, folder, None)}
            assert list(found["measures"]) == ["mean", *TASKS]
            (folder / "result.json").write_text(json.dumps(found))
    shapes = ("125m", "350m", "760m", "1.3b")
    names = [*(f"transformer_{shape}" for shape in shapes), *(f"xlstm_{s}_1to0" for s in shapes)]
    assert sorted(harness) == sorted((f"runs/{name}", "bf16") for name in names)
    assert cli.run([*words(*both), "--out", "out", "--strict"]) == 0, "nothing is left to do"
    made, judged = table.write(grid)
    means = {row["model"]: row["mean"]["mean"] for row in made["best"]}
    assert means == pytest.approx({"xLSTM[1:0]": 60.0, "Transformer": 50.0})
    assert [v["holds"] for v in judged] == [True, None]
    assert judged[0]["measured"] == {"won": 24, "sources": 24, "least share": 1.0}
    assert "43.89" in capsys.readouterr().out, "the paper's mean stands beside ours"


def test_a_run_that_does_not_exist_is_one_message(harness, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(words("Mamba-2")) == 2
    assert "launch pretrain/configs/mamba2_125m.yaml" in capsys.readouterr().err
    monkeypatch.setattr(downstream, "find_spec", lambda name: None)
    assert cli.run(words("Mamba-2")) == 2
    assert "pip install 'xlstm-pretrain[eval]'" in capsys.readouterr().err
    assert not list(tmp_path.rglob("result.json"))


def test_every_run_that_it_names_has_a_run_file():
    grid = Grid.open("downstream", "paper", Path("out"))
    configs = Path(__file__).parents[2] / "pretrain" / "configs"
    for cell in grid.cells:
        assert (configs / f"{downstream._run_of(grid, cell).name}.yaml").exists()
