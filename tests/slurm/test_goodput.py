"""The model of a long run: its closed form agrees with drawing the failures."""

import pytest

from benchmarks.large_runs.goodput import best_interval, goodput, parser, simulate


@pytest.mark.parametrize("nodes", [128, 2048])
@pytest.mark.parametrize("words", [[], ["--detect", "1800"], ["--write", "300", "--step", "30"]])
def test_the_closed_form_is_what_failures_cost(nodes, words):
    options = parser().parse_args(words)
    best = best_interval(options, nodes)
    drawn = sum(simulate(options, nodes, best, seed=seed) for seed in range(8)) / 8
    assert goodput(options, nodes, best) == pytest.approx(drawn, abs=0.01)


def test_the_best_interval_is_better_than_its_neighbours():
    options = parser().parse_args([])
    best = best_interval(options, 512)
    for factor in (0.7, 1.4):
        assert goodput(options, 512, round(best * factor)) < goodput(options, 512, best)


def test_a_run_that_fails_faster_than_it_starts_gets_nowhere():
    options = parser().parse_args(["--rate", "1000"])
    assert goodput(options, 2048, 10) == 0.0
