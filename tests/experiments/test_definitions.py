"""The experiments' files: read, cut into cells, and good run files at every size."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from data_prep.synthetic.rows import assign
from data_prep.synthetic.task import Span
from experiments import cli, data, definition
from experiments.cells import training
from experiments.definition import Cell
from experiments.grid import Grid
from experiments.results import table
from experiments.results.claims import Claim
from tests.data_prep.synthetic.definitions import digits_file
from xlstm_io.errors import ConfigError

ALL = definition.names()
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ALL)
def test_every_definition_names_only_what_it_has(name):
    experiment = definition.load(name)
    for size_name, size in experiment.sizes.items():
        assert set(size.models) <= set(experiment.models), size_name
        assert set(size.model_keys) | set(size.enough_for) <= set(size.models), size_name
        assert size.data or experiment.kind != "training", size_name
        if experiment.kind == "training":
            assert list(size.shapes) == size.axes.get("shape", []), size_name
        cells = definition.cells_of(size)
        assert len({cell.name for cell in cells}) == len(cells), "two cells share a folder"
        assert [cell.number for cell in cells] == list(range(len(cells)))
    for claim in experiment.claims:
        named = {*claim.solve, *claim.fail, *filter(None, (claim.model, claim.than))}
        assert named and named <= set(experiment.models), claim.claim
        assert claim.text()
        if experiment.kind == "training":
            assert claim.measure in experiment.measures
    if experiment.kind == "training":
        assert experiment.choose in experiment.measures
        assert experiment.figure.measure in experiment.measures


@pytest.mark.parametrize("name", [n for n in ALL if definition.load(n).kind == "training"])
def test_every_cell_has_a_sound_run_file(name, tmp_path, monkeypatch):
    """At every size: unknown keys and broken rules would only show on the cluster."""
    from pretrain.config import config_from_dict

    shards = SimpleNamespace(seq_len=64, tokenizer=SimpleNamespace(vocab_size=96))
    monkeypatch.setattr(training, "load_manifest", lambda path: shards)
    images = digits_file(tmp_path)
    monkeypatch.setattr("data_prep.synthetic.images._shipped", lambda: images)
    for size_name in definition.load(name).sizes:
        grid = Grid.open(name, size_name, tmp_path)
        for one in grid.size.data.values():
            if isinstance(one, definition.TaskData):
                data.task_of(one, tmp_path).check()
        each = {(c.model, c.values.get("data"), c.values.get("shape")): c for c in grid.cells}
        for cell in each.values():
            sections = training.run_file(grid, cell, tmp_path / "cell")
            config = config_from_dict(sections, f"{name} {size_name} {cell}")
            if cell.model not in grid.size.run_files:
                own = round(0.1 * config.run.steps)
                warmup = grid.size.run.get("schedule.warmup_steps", own)
                assert config.schedule.warmup_steps == warmup
            assert "lr" not in cell.values or config.optimizer.lr == cell.values["lr"]
        for cell in grid.cells[-1:]:  # the last of its seeds
            found = training.run_file(grid, cell, tmp_path / "cell")["run"].get("seed")
            assert found == cell.values.get("seed", found)


@pytest.mark.parametrize("name", ALL)
def test_who_is_said_to_fail_has_the_steps_of_one_who_solves_it(name):
    """A model that was hardly trained solves nothing, so that any claim of failing would hold."""
    experiment = definition.load(name)
    for claim in experiment.claims:
        assert claim.solve or not claim.fail, claim.claim
        for size in experiment.sizes.values():
            steps = {
                model: (experiment.run["run"] | _steps(size.run))["steps"]
                if "run.steps" not in size.model_keys.get(model, {})
                else size.model_keys[model]["run.steps"]
                for model in (*claim.solve, *claim.fail)
            }
            assert all(steps[a] >= max(map(steps.get, claim.solve)) for a in claim.fail)


def _steps(keys):
    return {"steps": keys["run.steps"]} if "run.steps" in keys else {}


PAPER_BATCHES = {  # appendix B.1: samples of a step; a row holds several where they are shorter
    "parity": 256,
    "formal": 256,
    "lra": 32,
    "mqar": {"64-tokens": 512, "128-tokens": 512, "256-tokens": 256},
    "mqar-lengths": 24,
}


@pytest.mark.parametrize("name", PAPER_BATCHES)
def test_a_step_at_paper_size_has_the_papers_samples(name, tmp_path, monkeypatch):
    shards = SimpleNamespace(seq_len=64, tokenizer=SimpleNamespace(vocab_size=96))
    monkeypatch.setattr(training, "load_manifest", lambda path: shards)
    grid = Grid.open(name, "paper", tmp_path)
    rng = np.random.default_rng(0)
    for data_name, one in grid.size.data.items():
        (cell, *_) = [c for c in grid.cells if c.values.get("data", data_name) == data_name]
        rows = training.run_file(grid, cell, tmp_path)["data"]["global_batch"]
        task = data.task_of(one, tmp_path)
        span = Span.parse(task.length, "length")
        drawn = task.draw(rng, (1 << 18) // span.high, span)
        row, _ = assign(drawn.lengths, task.seq_len or span.high)
        samples = rows * len(drawn) / (row.max() + 1)
        wanted = PAPER_BATCHES[name]
        wanted = wanted[data_name] if isinstance(wanted, dict) else wanted
        assert samples == pytest.approx(wanted, rel=0.1), data_name


@pytest.mark.parametrize(
    ("name", "final"),
    [("parity", 1e-5), ("formal", 1e-5), ("mqar", 1e-4), ("mqar-lengths", 1e-5), ("gating", 1e-7)],
)
def test_every_rate_ends_where_the_papers_do(name, final, tmp_path, monkeypatch):
    """`Cosine to 1e-5`: of the rate 1e-2 and of 1e-4."""
    shards = SimpleNamespace(seq_len=64, tokenizer=SimpleNamespace(vocab_size=96))
    monkeypatch.setattr(training, "load_manifest", lambda path: shards)
    grid = Grid.open(name, "paper", tmp_path)
    ends = set()
    for cell in grid.cells:
        sections = training.run_file(grid, cell, tmp_path)
        ends.add(round(sections["schedule"]["min_lr_ratio"] * cell.values["lr"], 12))
    assert ends == {final}


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ConfigError, match="did you mean parity"):
        definition.load("paritty")


def test_another_list_of_budgets_changes_no_cell():
    experiment = definition.load("scaling")
    size = experiment.sizes["toy"]
    shapes = {
        name: shape.model_copy(update={"budgets": [3e11]}) for name, shape in size.shapes.items()
    }
    cell = definition.cells_of(size)[0]
    fewer = size.model_copy(update={"shapes": shapes})
    settings = definition.settings_of(experiment, size, cell)
    assert definition.settings_of(experiment, fewer, cell) == settings
    assert "shape.run.model.hidden_size" in settings


def test_budgets_are_written_as_people_write_them():
    cells = Grid.open("scaling", "toy", Path("out")).cells
    (cell,) = definition.chosen(cells, ["budget=1e+11", "shape=w32", "model=xLSTM"])
    assert cell.name == "xLSTM-budget1e11-shapew32-lr0.003-seed0"
    assert str(cell) == "xLSTM, budget 1e+11, shape w32, lr 0.003, seed 0"
    assert definition.written(0.00046) == "0.00046"


def test_only_chooses_cells_and_refuses_what_there_is_not():
    cells = Grid.open("parity", "toy", Path("out")).cells
    found = definition.chosen(cells, ["model=LSTM", "lr=0.003"])
    assert [(c.model, c.values["lr"]) for c in found] == [("LSTM", 0.003)] * 2
    assert definition.chosen(cells, []) == cells
    refused = {"model=GRU": "is one of LSTM", "lr": "write KEY=VALUE", "x=1": "key of"}
    for word, says in refused.items():
        with pytest.raises(ConfigError, match=says):
            definition.chosen(cells, [word])


def test_each_of_the_data_has_its_own_rates_batch_and_steps(tmp_path, monkeypatch):
    shards = SimpleNamespace(seq_len=64, tokenizer=SimpleNamespace(vocab_size=96))
    monkeypatch.setattr(training, "load_manifest", lambda path: shards)
    grid = Grid.open("mqar-pairs", "paper", tmp_path)
    mine = [c for c in grid.cells if c.model == "Mamba-2" and c.values["seed"] == 0]
    assert len(mine) == 8 * 4, "four rates each"
    for name, highest, batch, steps in (
        ("short-few", 0.01, 128, 50_000),
        ("long-many", 0.001, 24, 266_667),
    ):
        cells = [c for c in mine if c.values["data"] == name]
        assert max(c.values["lr"] for c in cells) == highest
        sections = training.run_file(grid, cells[0], tmp_path / "cell")
        assert (sections["data"]["global_batch"], sections["run"]["steps"]) == (batch, steps)
        assert batch * steps == pytest.approx(64 * 100_000, rel=1e-4), "epochs of the paper"


def test_the_longest_set_is_that_with_the_largest_length(tmp_path):
    grid = Grid.open("mqar-lengths", "toy", tmp_path)
    numbers = {"trained": 1.0, "64": 0.9, "96": 0.8, "128": 0.4}
    sets = {
        name: {"chance": 0.25, "by_position": [{"from": 8, "answers": 4, "accuracy": value}]}
        for name, value in numbers.items()
    }
    assert training.measures_of(grid, sets) == {"recall": 1.0, "beyond": 0.4}
    assert training.scaled_of(grid, sets)["beyond"] == pytest.approx(0.2)
    assert training.measures_of(grid, {"trained": sets["trained"]}) == {"recall": 1.0}


def test_a_wrong_file_is_one_message(tmp_path, monkeypatch):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"title": "t", "model": {}}))
    monkeypatch.setattr(definition, "DEFINITIONS", tmp_path)
    with pytest.raises(ConfigError, match="source: Field required"):
        definition.load("bad")


def test_a_missing_option_of_a_task_is_one_message(tmp_path):
    misspelt = definition.TaskData(task="parity", options={"lenght": 3})
    with pytest.raises(ConfigError, match="lenght"):
        data.task_of(misspelt, tmp_path)
    with pytest.raises(ConfigError, match="use one of parity"):
        data.task_of(definition.TaskData(task="paritty"), tmp_path)


def test_given_shards_are_linked_or_the_message_says_how_to_build_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = Grid.open("lm", "paper", tmp_path / "out")
    with pytest.raises(ConfigError, match="build them first: python -m data_prep build"):
        data.prepare(grid, grid.cells[:1])
    shards = tmp_path / "data" / "slimpajama-shards"
    shards.mkdir(parents=True)
    (shards / "manifest.json").touch()
    monkeypatch.setattr(data, "load_manifest", lambda path: SimpleNamespace(seq_len=512))
    with pytest.raises(ConfigError, match="rows of 512 tokens, and this size needs 2048"):
        data.prepare(grid, grid.cells[:1])
    monkeypatch.setattr(data, "load_manifest", lambda path: SimpleNamespace(seq_len=2048))
    for _ in range(2):
        data.prepare(grid, grid.cells[:1])
    folder = data.data_folder(grid, "slimpajama")
    assert data.validation_folders(folder, "trained")["trained"].samefile(shards)
    assert not list((grid.folder / "claims").iterdir())


def test_packages_of_the_library_are_sources_of_their_own(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(data, "_run_command", lambda words: commands.append(words) or 0)
    grid = Grid.open("paloma", "toy", tmp_path)
    data.prepare(grid, grid.cells[:1])
    (build,) = [command for command in commands if command[1] == "build"]
    sources = yaml.safe_load(Path(build[2]).read_text())["sources"]
    assert [source["name"] for source in sources] == grid.size.data["stdlib"].packages
    assert all(list(Path(source["input"]).glob("*.py")) for source in sources)
    assert "--input" not in build and build[build.index("--valid-fraction") + 1] == "0.2"
    assert build[build.index("--out") + 1] == str(data.data_folder(grid, "stdlib") / "train")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "paritty"], "did you mean parity"),
        (["run", "parity", "--size", "small"], "has the sizes toy, paper"),
        (["run", "parity", "--jobs", "0"], "at least one cell"),
        (["cell", "parity", "--number", "24"], "has the cells 0 to 23"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(words, says, capsys, tmp_path):
    assert cli.run([*words, "--out", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_list_says_sizes_and_cells(capsys):
    assert cli.run(["list"]) == 0
    out = capsys.readouterr().out
    for name in ALL:
        assert f"{name}: " in out
    assert "24 cells" in out


def test_the_array_has_an_element_for_every_cell(capsys):
    site = ["--site", str(ROOT / "slurm" / "examples" / "cpu.yaml")]
    out = "/projects/grids"  # a folder that all nodes see
    assert cli.run(["slurm", "parity", "--size", "paper", "--out", out, *site]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --array=0-35" in text
    assert f"experiments cell parity --size paper --out {out} --number" in text
    assert text.count('"$SLURM_ARRAY_TASK_ID"') == 1


def test_report_of_nothing_lists_every_cell_as_missing_and_needs_no_torch(tmp_path):
    words = ["report", "parity", "--out", str(tmp_path), "--strict"]
    script = (
        f"import sys; from experiments import cli; print(cli.run({words}), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
    assert "24 of 24 cells have no numbers" in done.stdout
    assert "Nothing is measured yet" in done.stdout and "figure.png" not in done.stdout
    table = json.loads((tmp_path / "parity-toy" / "table.json").read_text())
    assert {row["status"] for row in table["cells"]} == {"missing"}
    verdicts = json.loads((tmp_path / "parity-toy" / "verdict.json").read_text())
    assert verdicts and all(item["holds"] is None and item["why"] for item in verdicts)


def test_a_report_says_when_and_where_its_cells_were_measured(tmp_path):
    grid = Grid.open("parallel", "toy", tmp_path)
    measured = {"status": "done", "measures": {"seconds": 1.0}, "scaled": {}}
    for cell, day, machine in zip(grid.cells, (3, 1, 2), ("a", "b", "a"), strict=False):
        result = measured | {"date": f"2026-01-0{day}", "machine": machine}
        grid.cell_folder(cell).mkdir(parents=True)
        (grid.cell_folder(cell) / "result.json").write_text(json.dumps(result))
    made = table.make(grid)
    assert "Measured on 2026-01-01 to 2026-01-03, a; b." in table.as_markdown(grid, made, [])


def test_a_rate_at_which_fewer_runs_failed_goes_first(tmp_path):
    """Of three seeds at 0.01 two diverged, and the third has the lowest error of all."""
    grid = Grid.open("gating", "toy", tmp_path)
    for cell in grid.cells[:6]:
        lr, seed = cell.values["lr"], cell.values["seed"]
        error = 0.1 * lr + 0.01 + 0.001 * seed
        result = {"status": "done", "measures": {"error": error}, "scaled": {}}
        if lr == 0.01:
            result = {"status": "failed", "reason": "diverged"} if seed else result
            result |= {"measures": {"error": 0.001}} if not seed else {}
        grid.cell_folder(cell).mkdir(parents=True)
        (grid.cell_folder(cell) / "result.json").write_text(json.dumps(result))
    (best,) = table.make(grid)["best"]
    assert (best["lr"], best["n"], best["failed"]) == (0.003, 3, 0)
    assert best["std"]["error"] == pytest.approx(0.001), "of the sample: n - 1"
    for cell in grid.cells[:3]:
        (grid.cell_folder(cell) / "result.json").unlink()
    (best,) = table.make(grid)["best"]
    assert (best["lr"], best["n"], best["failed"]) == (0.01, 1, 2)


def test_a_rate_without_a_number_is_not_the_best(tmp_path):
    grid = Grid.open("gating", "toy", tmp_path)
    for cell, error in ((grid.cells[0], float("nan")), (grid.cells[3], 0.05)):
        result = {"status": "done", "measures": {"error": error}, "scaled": {}}
        grid.cell_folder(cell).mkdir(parents=True)
        (grid.cell_folder(cell) / "result.json").write_text(json.dumps(result))
    (best,) = table.make(grid)["best"]
    assert best["lr"] == grid.cells[3].values["lr"] == 0.01


def test_a_claim_is_a_rule_in_words():
    claim = Claim(claim="c", where="w", rule="separates", measure="long", solve=["a"], fail=["b"])
    assert claim.text() == "scaled accuracy of long: a >= 0.95, b <= 0.1"


FIGURES = ROOT / "docs" / "figures"


KEPT = sorted(path.name.removesuffix("-table.json") for path in FIGURES.glob("*-table.json"))


@pytest.mark.parametrize("kept_grid", KEPT)
def test_kept_results_give_their_verdicts_by_the_rules_of_today(kept_grid):
    kept = json.loads((FIGURES / f"{kept_grid}-table.json").read_text())
    grid = Grid.open(kept["experiment"], kept["size"], Path("out"))
    assert kept_grid == grid.folder.name and (FIGURES / f"{kept_grid}-figure.png").exists()
    judged = [verdict["holds"] for verdict in table.verdicts(grid, kept)]
    stored = json.loads((FIGURES / f"{kept_grid}-verdict.json").read_text())
    assert judged == [verdict["holds"] for verdict in stored]
    names = {cell.name for cell in grid.cells}
    assert {Cell(0, row["model"], row["values"]).name for row in kept["cells"]} == names


def test_measures_are_means_over_positions_weighted_by_answers(tmp_path):
    grid = Grid.open("lengths", "toy", tmp_path)
    groups = [
        {"from": 32, "answers": 5, "loss": 9.0},
        {"from": 64, "answers": 10, "loss": 2.0},
        {"from": 128, "answers": 10, "loss": 7.0},
        {"from": 512, "answers": 1, "loss": 2.0},
        {"from": 1024, "answers": 3, "loss": 4.0},
    ]
    trained = [{"from": 1, "answers": 2, "loss": 1.0}, {"from": 2, "answers": 2, "loss": 3.0}]
    sets = {"trained": {"by_position": trained}, "1024": {"by_position": groups}}
    found = training.measures_of(grid, sets)
    assert found == {"trained": 2.0, "inside": 2.0, "rise": (2.0 + 3 * 4.0) / 4 - 2.0}
    assert training.scaled_of(grid, sets) == {}
    empty = {"trained": {"by_position": trained}, "1024": {"by_position": groups[:1]}}
    assert training.measures_of(grid, empty) == {"trained": 2.0}, "of no token there is no mean"
    measure = definition.Measure(set="trained", value="perplexity")
    assert training._from(sets["trained"], measure) == pytest.approx(math.exp(2.0))
    answered = {"by_position": [{"from": 4, "answers": 8, "accuracy": 0.75}]}
    measure = definition.Measure(set="trained", value="error")
    assert training._from(answered, measure) == 0.25
