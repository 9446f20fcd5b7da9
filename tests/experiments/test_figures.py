"""Figures that no grid of the other tests draws."""

import pytest

from experiments import definition
from experiments.results.figure import draw
from experiments.results.scaling import fits
from tests.experiments.test_scaling import published, rows


def table_of(name, best):
    experiment = definition.load(name)
    return experiment, {"title": experiment.title, "size": "toy", "best": best, "cells": []}


@pytest.fixture
def picture(tmp_path):
    def drawn(experiment, table):
        draw(experiment, table, tmp_path / "figure.png")
        return (tmp_path / "figure.png").read_bytes()

    return drawn


def test_perplexity_by_source(picture):
    best = [
        {"model": model, "by_source": {"asyncio": loss, "email": 2.0}}
        for model, loss in (("xLSTM[1:0]", 2.5), ("Transformer", 2.7))
    ]
    first = picture(*table_of("paloma", best))
    best[1]["by_source"]["asyncio"] = 2.4
    assert len(first) > 10_000 and first != picture(*table_of("paloma", best))


def test_the_best_of_every_budget_is_marked(picture):
    best = rows("Transformer", published())
    experiment, table = table_of("scaling", best)
    table["fits"] = fits(best, "loss")
    marked = picture(experiment, table)
    table["fits"]["Transformer"]["optima"] = []
    assert len(marked) > 10_000 and marked != picture(experiment, table)


def test_numbers_of_very_different_sizes_stand_on_a_logarithmic_axis(picture):
    best = [
        {"model": name, "values": {}, "mean": {"perplexity": value}, "std": {"perplexity": 1.0}}
        for name, value in (("LSTM layers", 54.0), ("xLSTM[1:0]", 25.0))
    ]
    experiment, table = table_of("ablation", best)
    assert experiment.figure.logarithmic
    drawn = picture(experiment, table)
    figure = experiment.figure.model_copy(update={"logarithmic": False})
    plain = experiment.model_copy(update={"figure": figure})
    assert len(drawn) > 10_000 and drawn != picture(plain, table)
