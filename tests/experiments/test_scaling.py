"""Scaling laws: found again in made runs and in the published runs of arXiv 2510.02228."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import definition
from experiments.cells import training
from experiments.grid import Grid
from experiments.results.scaling import (
    Trained,
    fits,
    lines,
    loss_law,
    lowest,
    optima,
    power_law,
    runs_of,
)
from tests.experiments.test_claims import judged
from xlstm_mcore.settings import ModelConfig
from xlstm_mcore.sizes.flops import training_flops

PUBLISHED = Path(__file__).with_name("isoflop_transformer_8192.json")


def published() -> list[Trained]:
    """The finished runs of the Transformer with rows of 8,192 tokens, a budget after another."""
    return [Trained(*run) for run in json.loads(PUBLISHED.read_text())["runs"]]


class TestPublishedRuns:
    """The paper prints 0.5749 +- 0.0030 for parameters and 0.4243 +- 0.0016 for tokens."""

    def laws(self):
        points = optima(published())
        assert [point.budget for point in points] == [6e18, 1e19, 3e19, 1e20]
        budgets = [point.budget for point in points]
        return (
            power_law(budgets, [point.parameters for point in points]),
            power_law(budgets, [point.tokens for point in points]),
        )

    def test_exponents_are_the_printed_ones_within_the_errors(self):
        size, tokens = self.laws()
        assert size.exponent == pytest.approx(0.5749, abs=2 * (0.0030 + size.error))
        assert tokens.exponent == pytest.approx(0.4243, abs=2 * (0.0016 + tokens.error))
        assert size.error < 0.01 and tokens.error < 0.01

    def test_a_model_of_a_billion_wants_the_printed_compute_and_tokens(self):
        size, tokens = self.laws()
        compute = (1e9 / size.factor) ** (1 / size.exponent)
        assert compute == pytest.approx(1.78e20, rel=0.05)
        assert tokens.factor * compute**tokens.exponent == pytest.approx(22.8e9, rel=0.05)

    def test_the_law_of_all_runs_is_near_most_of_them(self):
        law = loss_law(published())
        assert law.error < 0.01
        assert min(law.floor, law.of_parameters, law.a, law.of_tokens, law.b) > 0


def made(lead: float = 0.0, exponent: float = 0.5, budgets=(1e18, 1e19, 1e20)) -> list[Trained]:
    """Runs whose best size is `budget^exponent`, where the loss is `3 - lead`."""
    return [
        Trained(c, n, c / (6 * n), 3.0 - lead + np.log(n / c**exponent) ** 2)
        for c in budgets
        for n in c**exponent * np.array([0.3, 0.8, 2.0, 5.0])
    ]


def rows(model: str, runs: list[Trained]) -> list[dict]:
    return [
        {
            "model": model,
            "values": {"budget": run.budget, "shape": f"{run.parameters:g}"},
            "parameters": run.parameters,
            "tokens": run.tokens,
            "mean": {"loss": run.loss},
        }
        for run in runs
    ]


def test_the_best_size_of_a_budget_is_the_parabolas():
    for point in optima(made(lead=0.5)):
        assert point.parameters == pytest.approx(point.budget**0.5)
        assert point.tokens == pytest.approx(point.budget**0.5 / 6)
        assert point.loss == pytest.approx(2.5)


def test_a_best_size_outside_of_those_that_were_run_is_none():
    sizes = [1e6, 2e6, 4e6, 8e6]
    assert lowest(sizes, [4.0, 3.5, 3.1, 2.8]) is None, "still falling"
    assert lowest(sizes, [3.0, 3.1, 3.15, 3.1]) is None, "a hill"
    assert lowest(sizes[:2], [3.0, 3.1]) is None
    assert lowest(sizes, [3.1, 3.0, 3.0, 3.1])[0] == pytest.approx(8**0.5 * 1e6)


def test_a_power_law_and_its_error():
    x = [1e18, 1e19, 1e20, 1e21]
    law = power_law(x, [0.01 * c**0.55 for c in x])
    assert (law.factor, law.exponent) == pytest.approx((0.01, 0.55))
    assert law.error < 1e-9
    bent = power_law(x, [c**0.55 * f for c, f in zip(x, (1, 1.2, 0.9, 1), strict=True)])
    assert 0.01 < bent.error < 0.1
    assert power_law(x[:2], x[:2]) is None


def test_the_law_of_the_loss_is_found_and_a_short_run_does_not_bend_it():
    runs = [
        Trained(c, n, c / (6 * n), 1.7 + 400 * n**-0.34 + 410 * (c / (6 * n)) ** -0.28)
        for c in (1e18, 1e19, 1e20, 1e21)
        for n in c**0.5 * np.array([0.03, 0.1, 0.3, 1.0])
    ]
    law = loss_law(runs)
    assert (law.floor, law.a, law.b) == pytest.approx((1.7, 0.34, 0.28), rel=0.02)
    short = Trained(1e18, 3e9, 6e7, 2 * max(run.loss for run in runs))
    bent = loss_law([*runs, short])
    assert (bent.floor, bent.a, bent.b) == pytest.approx((1.7, 0.34, 0.28), rel=0.15)
    assert loss_law(runs[:5]) is None


DOMINATES = {"rule": "dominates", "measure": "loss", "model": "a", "than": "b"}
EXPONENT = {"rule": "exponent", "measure": "loss", "model": "a", "at_least": 0.48, "at_most": 0.52}


class TestVerdicts:
    def judge(self, ours, other):
        return judged(dict(DOMINATES), rows("a", ours) + rows("b", other))

    def test_a_lower_loss_at_every_budget_holds(self):
        assert self.judge(made(lead=0.1), made()) is True
        assert self.judge(made(), made(lead=0.1)) is False

    def test_a_lower_loss_at_some_budgets_is_open(self):
        mixed = [run for lead, c in ((0.1, 1e18), (-0.1, 1e19)) for run in made(lead, budgets=[c])]
        assert self.judge(mixed, made()) is None
        assert self.judge(made(lead=0.1)[:8], made()) is None, "two budgets"
        assert self.judge([], made()) is None

    @pytest.mark.parametrize(("power", "holds"), [(0.5, True), (0.6, False)])
    def test_exponent(self, power, holds):
        assert judged(dict(EXPONENT), rows("a", made(exponent=power))) is holds

    def test_an_exponent_outside_by_chance_is_open(self):
        """The error is 0.003, and with one degree of freedom 12.7 times that may be chance."""
        runs = [
            run
            for c, e in zip((1e18, 1e19, 1e20), (0.54, 0.5405, 0.54), strict=True)
            for run in made(exponent=e, budgets=[c])
        ]
        assert judged(dict(EXPONENT), rows("a", runs)) is None
        assert judged({**EXPONENT, "at_most": 0.55}, rows("a", runs)) is True

    def test_an_exponent_with_a_large_error_is_open(self):
        runs = [
            run
            for c, e in zip((1e18, 1e19, 1e20), (0.5, 0.53, 0.5), strict=True)
            for run in made(exponent=e, budgets=[c])
        ]
        assert judged(dict(EXPONENT), rows("a", runs)) is None
        assert judged(dict(EXPONENT), rows("a", made()[:8])) is None, "two budgets"


def test_the_fits_are_written_in_words_and_numbers():
    found = fits(rows("a", made()) + rows("b", made()[:4]), "loss")
    assert len(found["a"]["optima"]) == 3 and found["b"]["parameters"] is None
    json.dumps(found)
    text = "\n".join(lines(found))
    assert "a: best parameters = 1 C^0.5000" in text and "b, best of a budget: 1e+09" in text
    assert runs_of([{"model": "a", "values": {}, "mean": {"loss": 1.0}}], "a", "loss") == []


def test_the_steps_of_a_cell_take_its_budget(tmp_path, monkeypatch):
    """Attention's FLOPs and the head's are counted, so equal budgets are equal."""
    shards = SimpleNamespace(seq_len=128, tokenizer=SimpleNamespace(vocab_size=512))
    monkeypatch.setattr(training, "load_manifest", lambda path: shards)
    grid = Grid.open("scaling", "toy", tmp_path)
    for cell in grid.cells:
        sections = training.run_file(grid, cell, tmp_path / "cell")
        model = ModelConfig.model_validate(sections["model"])
        assert len(model.pattern) == grid.size.shapes[str(cell.values["shape"])].layers
        assert set(model.pattern) == {"M" if cell.model == "xLSTM" else "*"}
        taken = sections["run"]["steps"] * 8 * 128 * training_flops(model, 128)
        assert taken == pytest.approx(cell.values["budget"], rel=0.05)


def test_sizes_of_the_paper_are_those_of_its_budgets(tmp_path, monkeypatch):
    """Runs near them exist at each budget, five sizes at least, and no warmup outlasts its run."""
    from pretrain.config import config_from_dict

    shards = SimpleNamespace(seq_len=8192, tokenizer=SimpleNamespace(vocab_size=50304))
    monkeypatch.setattr(training, "load_manifest", lambda path: shards)
    grid = Grid.open("scaling", "paper", tmp_path)
    for cell in grid.cells:
        config_from_dict(training.run_file(grid, cell, tmp_path / "cell"), str(cell))
    for budget in grid.size.axes["budget"]:
        shapes = {c.values["shape"] for c in grid.cells if c.values["budget"] == budget}
        sizes = [run.parameters for run in published() if run.budget == budget]
        assert len(shapes) >= 5
        for shape in shapes:
            wanted = float(shape[:-1]) * {"M": 1e6, "B": 1e9}[shape[-1]]
            assert min(abs(size / wanted - 1) for size in sizes) < 0.02


@pytest.mark.parametrize("size_name", ["toy", "small", "large"])
def test_models_of_lm_have_equal_parameters(size_name, tmp_path, monkeypatch):
    from xlstm_mcore.sizes.parameters import count_parameters

    shards = SimpleNamespace(seq_len=256, tokenizer=SimpleNamespace(vocab_size=1024))
    monkeypatch.setattr(training, "load_manifest", lambda path: shards)
    grid = Grid.open("lm", size_name, tmp_path)
    cells = {cell.model: cell for cell in definition.cells_of(grid.size)}
    counts = {}
    for model, cell in cells.items():
        section = training.run_file(grid, cell, tmp_path)["model"]
        counts[model] = count_parameters(ModelConfig.model_validate(section))["blocks"]
    ours = counts["xLSTM[1:0]"]
    assert all(abs(count / ours - 1) < 0.05 for count in counts.values()), counts
