"""Figures of the looks into the layers of one run: a colour for every layer and step."""

import math
from collections.abc import Callable
from typing import Any

from pretrain.report.figures import figure_as_png, new_figure
from pretrain.report.runs import RunRecord


def _log10(key: str, over: str | None = None) -> Callable[[dict[str, Any]], float]:
    """The decimal logarithm of a figure, or of its ratio to another one."""

    def read(line: dict[str, Any]) -> float:
        value, below = line.get(key), 1.0 if over is None else line.get(over)
        return math.log10(value / below) if value and below else math.nan

    return read


def _plain(key: str) -> Callable[[dict[str, Any]], float]:
    def read(line: dict[str, Any]) -> float:
        value = line.get(key)
        return math.nan if value is None else value

    return read


FIGURES = {
    "Input gate, median pre-activation": _plain("igate_p50"),
    "Forget gate, median pre-activation": _plain("fgate_p50"),
    "State, log of its norm": _plain("state_log_norm"),
    "Normaliser, log": _plain("normalizer_log"),
    "Gradient norm, log10": _log10("grad_norm"),
    "Update over weights, log10": _log10("update_norm", "weight_norm"),
}


def layer_figures(run: RunRecord) -> list[tuple[str, bytes | None]]:
    """Title and PNG image of each figure; None where nothing of it was recorded."""
    return [(title, _heat_map(run, read)) for title, read in FIGURES.items()]


def _heat_map(run: RunRecord, read: Callable[[dict[str, Any]], float]) -> bytes | None:
    lines = [line for line in run.cells if isinstance(line["layer"], int)]
    steps = sorted({line["step"] for line in lines})
    layers = 1 + max((line["layer"] for line in lines), default=-1)
    values = [[math.nan] * len(steps) for _ in range(layers)]
    places = {step: place for place, step in enumerate(steps)}
    for line in lines:
        values[line["layer"]][places[line["step"]]] = read(line)
    if all(math.isnan(value) for row in values for value in row):
        return None
    figure, axes = new_figure("step", "layer", size=(5.2, 3.0))
    gap = (steps[-1] - steps[0]) / max(1, len(steps) - 1) or 1
    image = axes.imshow(
        values,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(steps[0] - gap / 2, steps[-1] + gap / 2, -0.5, layers - 0.5),
    )
    axes.grid(visible=False)
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image)
    return figure_as_png(figure)
