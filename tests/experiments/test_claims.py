"""The rules of verdicts on made numbers: each can hold, be refuted, and be left open."""

import math

import numpy as np
import pytest

from experiments.results.chance import Mean, summed
from experiments.results.claims import Claim
from experiments.results.rules import slope_of, verdict
from experiments.results.table import _deviation


def row(model, mean, *, std=0.0, n=3, scaled=None, **values):
    means = mean if isinstance(mean, dict) else {"x": mean}
    return {
        "model": model,
        "values": values,
        "n": n,
        "mean": means,
        "std": dict.fromkeys(means, std),
        "scaled": scaled or {},
    }


def found(claim, best, enough_for=(), trained="trained", cells=()):
    claim = Claim(claim="c", where="w", **{"measure": "x"} | claim)
    return verdict(claim, cells, best, enough_for, trained)


def judged(*arguments, **options):
    return found(*arguments, **options)["holds"]


def cell(model, status="missing", **values):
    return {"model": model, "status": status, "values": values}


def accuracies(long, trained=1.0):
    return {"long": long, "trained": trained}


class TestSeparates:
    def judge(self, s, m, enough_for=()):
        claim = {"rule": "separates", "measure": "long", "solve": ["s"], "fail": ["m"]}
        best = [row("s", 0, scaled=s)] + ([row("m", 0, scaled=m)] if m else [])
        return judged(claim, best, enough_for)

    def test_holds(self):
        assert self.judge(accuracies(0.99), accuracies(0.01, trained=0.3)) is True

    def test_the_one_that_should_fail_solves_it(self):
        assert self.judge(accuracies(0.99), accuracies(0.5)) is False

    def test_fitted_and_not_solved(self):
        assert self.judge(accuracies(0.2, trained=0.99), accuracies(0.0)) is False

    def test_not_fitted_leaves_it_open(self):
        assert self.judge(accuracies(0.2, trained=0.5), accuracies(0.0)) is None

    def test_not_fitted_though_the_size_is_known_to_be_enough(self):
        assert self.judge(accuracies(0.0, trained=0.3), accuracies(0.0), ["s"]) is False

    def test_a_missing_model_leaves_it_open(self):
        assert self.judge(accuracies(0.99), None) is None

    def test_a_missing_seed_leaves_it_open(self):
        """Of either model, whatever the others came to: its mean may change yet."""
        claim = {"rule": "separates", "measure": "long", "solve": ["s"], "fail": ["m"]}
        for s, m in ((0.99, 0.01), (0.2, 0.5)):
            best = [row("s", 0, scaled=accuracies(s)), row("m", 0, scaled=accuracies(m))]
            held = judged(claim, best, cells=[cell("s", "done", seed=0), cell("m", "failed")])
            assert held is (s == 0.99)
            both = [cell("s", seed=1), cell("m", seed=1), cell("m", seed=2), cell("other")]
            open_ = found(claim, best, cells=both)
            assert open_["holds"] is None and open_["measured"] == {"s": s, "m": m}
            assert open_["why"] == "1 cell of s is missing; 2 cells of m are missing"

    def test_a_model_that_is_there_refutes_it_without_the_others(self):
        claim = {"rule": "separates", "measure": "long", "solve": ["s"], "fail": ["m"]}
        assert judged(claim, [row("m", 0, scaled=accuracies(0.5))], cells=[cell("s")]) is False

    def test_the_worst_of_several_data_counts(self):
        best = [
            row("s", 0, scaled=accuracies(1.0), data="a"),
            row("s", 0, scaled=accuracies(0.1), data="b"),
        ]
        claim = {"rule": "separates", "measure": "long", "solve": ["s"]}
        assert judged(claim, best) is False
        assert judged({**claim, "at": {"data": "a"}}, best) is True


LOWER = {"rule": "lower", "model": "a", "than": "b"}


@pytest.mark.parametrize(
    ("better", "worse", "std", "n", "holds"),
    [
        (0.10, 0.20, 0.01, 3, True),
        (0.20, 0.10, 0.01, 3, False),
        (0.10, 0.11, 0.02, 3, None),
        (0.10, 0.20, 0.01, 1, None),
        (0.10, 0.14, 0.01, 2, None),  # four standard errors of two seeds each
        (0.10, 0.15, 0.01, 2, True),
    ],
)
def test_lower_needs_more_than_chance(better, worse, std, n, holds):
    best = [row("a", better, std=std, n=n), row("b", worse, std=std, n=n)]
    assert judged(dict(LOWER), best) is holds


def test_two_of_the_same_are_seldom_told_apart():
    """Two seeds each: two standard errors would tell one of five pairs apart."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(4000, 2, 2))
    told = 0
    for means, deviations in zip(draws.mean(2), draws.std(2, ddof=1), strict=True):
        told += (
            summed(
                [Mean(f, m, s, 2) for f, m, s in zip((1, -1), means, deviations, strict=True)]
            ).sign
            is not None
        )
    assert told / len(draws) == pytest.approx(0.05, abs=0.012)


def test_lower_holds_on_each_of_the_data():
    def best(*pairs):
        return [
            row(model, value, std=0.01, data=str(n))
            for n, pair in enumerate(pairs)
            for model, value in zip("ab", pair, strict=True)
        ]

    assert judged(dict(LOWER), best((0.1, 0.2), (0.3, 0.4))) is True
    assert judged(dict(LOWER), best((0.1, 0.2), (0.4, 0.3))) is False
    assert judged(dict(LOWER), best((0.1, 0.2), (0.3, 0.301))) is None
    assert judged(dict(LOWER), best((0.1, 0.2), (0.3, 0.4))[:3]) is None


def test_the_seeds_that_survived_do_not_stand_for_those_that_failed():
    best = [row("a", 0.1, std=0.01) | {"failed": 1}, row("b", 0.2, std=0.01)]
    open_ = found(dict(LOWER), best)
    assert open_["holds"] is None and open_["why"] == "1 run of a failed at its best rate"
    claim = {"rule": "separates", "measure": "long", "solve": ["s"]}
    survivors = [row("s", 0, scaled=accuracies(1.0)) | {"failed": 2}]
    assert found(claim, survivors)["why"] == "2 runs of s failed at its best rate"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_measure_that_is_no_number_decides_nothing(value):
    for ours, other in ((1.0, value), (value, 1.0)):
        open_ = found(LOWER, [row("a", ours, std=0.1), row("b", other, std=0.1)])
        assert open_["holds"] is None and f"is {value}" in open_["why"]
    assert math.isnan(_deviation([value, 1.0])) and _deviation([2.0, 2.0]) == 0.0


def test_data_on_which_all_runs_failed_are_not_passed_over():
    claim = {"rule": "separates", "measure": "long", "solve": ["s"]}
    best = [row("s", 0, scaled=accuracies(1.0), data="a")]
    cells = [cell("s", "failed", data=data, lr=0.1, seed=0) for data in "ab"]
    assert judged(claim, best, cells=cells[:1]) is True
    open_ = found(claim, best, cells=cells)
    assert (open_["holds"], open_["why"]) == (None, "all runs of s failed, data b")


@pytest.mark.parametrize(
    ("claim", "best"),
    [
        ({"rule": "lower", "than": "b"}, [row("a", 0.1), row("b", 0.2)]),
        ({"rule": "slope", "over": "t", "at_most": 3}, [row("a", t, t=t) for t in (1, 2, 4)]),
        ({"rule": "ratio", "than": "b", "over": "t", "at_least": 2},
         [row("a", 1, t=1), row("b", 3, t=1)]),
        ({"rule": "constant", "over": "t", "at_most": 2}, [row("a", 1, t=t) for t in (1, 2)]),
        ({"rule": "rises", "over": "t", "at_least": 2}, [row("a", t, t=t) for t in (1, 2)]),
        ({"rule": "below", "at_most": 2}, [row("a", 1)]),
        ({"rule": "above", "at_least": 0.5}, [row("a", 1)]),
        ({"rule": "wins", "than": "b", "at_least": 0.5},
         [row("a", 1) | {"by_source": {"x": 1}}, row("b", 2) | {"by_source": {"x": 2}}]),
    ],
    ids=lambda value: value.get("rule") if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_missing_cell_leaves_every_rule_open(claim, best):
    claim |= {"model": "a", "at": {"size": "big"}}
    best = [one | {"values": one["values"] | {"size": "big"}} for one in best]
    elsewhere = [cell("c", size="big"), cell("a", size="small"), cell("a", "failed", size="big")]
    assert judged(claim, best, cells=elsewhere) is True
    open_ = found(claim, best, cells=[*elsewhere, cell("a", size="big")])
    assert open_["holds"] is None and open_["measured"]
    assert open_["why"] == "1 cell of a is missing"


def line(model, power, sizes=(512, 1024, 2048, 4096, 8192), overhead=0.0):
    return [row(model, 1e-6 * t**power + overhead, tokens=t) for t in sizes]


def test_slope_is_that_of_the_upper_half():
    points = [(t, 1e-3 + 1e-6 * t) for t in (16, 64, 256, 4096, 16384, 65536)]
    assert slope_of(points) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("power", "linear", "square"), [(1.0, True, False), (2.0, False, True)])
def test_slope(power, linear, square):
    rule = {"rule": "slope", "model": "a", "over": "tokens"}
    assert judged({**rule, "at_most": 1.1}, line("a", power)) is linear
    assert judged({**rule, "more_than": 1.6}, line("a", power)) is square
    assert judged({**rule, "at_most": 1.1}, line("a", power)[:2]) is None


def test_ratio_is_taken_at_the_largest_size_of_both():
    rule = {"rule": "ratio", "model": "a", "than": "b", "over": "tokens", "at_least": 10}
    best = line("a", 1.0) + [row("b", 1e-6 * t * 12, tokens=t) for t in (512, 1024)]
    assert judged(dict(rule), best) is True
    assert judged({**rule, "at_least": 13}, best) is False
    assert judged(dict(rule), line("a", 1.0)) is None


def test_constant_rises_and_below():
    flat, rising = line("a", 0.0), line("b", 1.0)
    over = {"over": "tokens"}
    assert judged({"rule": "constant", "model": "a", "at_most": 1.05, **over}, flat) is True
    assert judged({"rule": "constant", "model": "b", "at_most": 1.05, **over}, rising) is False
    assert judged({"rule": "rises", "model": "b", "at_least": 1.2, **over}, rising) is True
    assert judged({"rule": "rises", "model": "a", "at_least": 1.2, **over}, flat) is False
    assert judged({"rule": "below", "model": "a", "at_most": 2.0}, flat) is True
    assert judged({"rule": "below", "model": "b", "at_most": 1e-3}, rising) is False
    assert judged({"rule": "above", "model": "b", "at_least": 1e-4}, rising) is True
    assert judged({"rule": "above", "model": "b", "at_least": 1e-3}, rising) is False
    for rule in ("constant", "rises", "below", "above"):
        claim = {"rule": rule, "model": "c", "at_most": 1.0, "at_least": 1.0, **over}
        assert judged(claim, flat) is None


def test_a_limit_is_kept_by_more_than_chance_where_there_are_seeds():
    """Three seeds with the deviation 0.1: 4.3 standard errors, of 0.058, are 0.25."""
    below = {"rule": "below", "model": "a", "at_most": 1.0}
    above = {"rule": "above", "model": "a", "at_least": 1.0}
    for mean, within in [(0.7, True), (0.8, None), (1.2, None), (1.3, False)]:
        assert judged(dict(below), [row("a", mean, std=0.1)]) is within
        assert judged(dict(above), [row("a", 2.0 - mean, std=0.1)]) is within
        assert judged(dict(below), [row("a", mean, std=0.1, n=1)]) is (mean < 1)
    mixed = [row("a", mean, std=0.1, t=t) for t, mean in enumerate((0.7, 0.8))]
    assert judged(dict(below), mixed) is None
    assert judged(dict(below), [*mixed, row("a", 1.3, std=0.1, t=2)]) is False


def test_wins_counts_the_sources_of_each_size():
    def best(*losses, model="a"):
        return [
            row(model, 1.0, shape=n) | {"by_source": dict(zip("xyz", three, strict=True))}
            for n, three in enumerate(losses)
        ]

    other = best((2.0, 2.0, 2.0), (2.0, 2.0, 2.0), model="b")
    rule = {"rule": "wins", "model": "a", "than": "b"}
    ours = best((1.0, 1.0, 1.0), (1.0, 1.0, 3.0))
    assert judged({**rule, "at_least": 0.6}, ours + other) is True
    assert judged({**rule, "at_least": 0.8}, ours + other) is False, "of one size, 5 of 6 of both"
    assert judged({**rule, "more_than": 0.6}, ours + other) is True
    assert judged({**rule, "more_than": 2 / 3}, ours + other) is False
    assert judged({**rule, "at_least": 0.6}, ours) is None
    assert judged({**rule, "at_least": 0.6}, ours + other[:1]) is None
    assert judged({**rule, "at_least": 0.6}, [row("a", 1.0), row("b", 1.0)]) is None
    assert (
        "more than 50.0% of" in Claim(claim="", where="", measure="x", more_than=0.5, **rule).text()
    )


class TestMatters:
    def judge(self, few, many, short, std=0.01, n=2):
        numbers = {"long-few": few, "long-many": many, "short-few": short}
        best = [
            row("m", 0.0, std=std, n=n, scaled={"x": value}, data=name) | {"chance": 0.5}
            for name, value in numbers.items()
        ]
        claim = {"rule": "matters", "model": "m"}
        claim |= {"between": ("long-few", "long-many"), "against": ("short-few", "long-few")}
        return judged(claim, best)

    def test_holds(self):
        assert self.judge(0.9, 0.2, 0.95) is True

    def test_the_other_matters_more(self):
        assert self.judge(0.5, 0.4, 0.95) is False

    def test_within_the_error(self):
        assert self.judge(0.9, 0.85, 0.88) is None
        assert self.judge(0.9, 0.2, 0.95, std=0.4) is None

    def test_the_data_of_both_differences_count_twice(self):
        """Where it lies between the others: 2 long-few - long-many - short-few."""
        assert self.judge(0.5, 0.32, 0.555, std=0.02, n=3) is None, "0.125; the bound is 0.139"
        assert self.judge(0.5, 0.38, 0.465, std=0.02, n=3) is None, "it drops out: 0.085 of 0.091"

    def test_one_seed(self):
        assert self.judge(0.9, 0.2, 0.95, n=1) is None

    def test_data_that_are_not_measured(self):
        best = [row("m", 0.0, scaled={"x": 0.3}, data="long-few")]
        claim = {"rule": "matters", "model": "m", "between": ("long-few", "long-many")}
        assert judged({**claim, "against": ("short-few", "long-few")}, best) is None
