"""Figures of one run or several, as PNG."""

import io
import os
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from pretrain.report.runs import RunRecord
from xlstm_io.errors import UserError
from xlstm_io.storage import absolute

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
BASELINE_COLORS = ("tab:red", "tab:purple", "tab:green", "tab:brown", "tab:gray")
# A smoothed point is the mean of about this share of a curve's points before it.
SMOOTHING = 0.02


def smoothed(values: Sequence[float], share: float = SMOOTHING) -> list[float]:
    """Exponential moving average over about `share` of the values, without a bias at the start."""
    keep = 1 - 1 / max(1.0, share * len(values))
    total = weight = 0.0
    found = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        found.append(total / weight)
    return found


def draw_loss(run: RunRecord, path: str | os.PathLike) -> None:
    """Draw training and validation loss over steps, among the n-gram models, into a PNG file.

    Raises:
        UserError: the run has no loss yet.
    """
    steps, losses = run.points("loss")
    valid_steps, valid_losses = run.points("valid_loss")
    if not steps and not valid_steps:
        raise UserError(f"{run.folder} has no loss to draw; train at least one logged step")
    figure, axes = new_figure("step", "loss (nats per token)")
    axes.plot(steps, losses, color="tab:blue", linewidth=1.2, label="training")
    axes.plot(valid_steps, valid_losses, "o-", color="tab:orange", label="validation")
    _draw_baselines(run, axes)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)


def loss_figure(runs: Sequence[RunRecord], by: str) -> bytes | None:
    """Training loss with its smoothed curve, and each validation set, of one run or several.

    Args:
        runs: what to draw.
        by: `step` or `tokens`.

    Returns:
        A PNG image; None where there is nothing to draw.
    """
    figure, axes = new_figure(by, "loss (nats per token)")
    drawn = False
    for number, run in enumerate(runs):
        color = COLORS[number % len(COLORS)]
        where, losses = run.points("loss", by)
        if where:
            drawn = True
            axes.plot(where, losses, color=color, linewidth=0.8, alpha=0.35)
            label = "training" if len(runs) == 1 else name_of(run)
            axes.plot(where, smoothed(losses), color=color, linewidth=1.6, label=label)
        for style, key in zip(cycle(("o--", "s:", "^-.", "d--")), run.valid_keys):
            where, losses = run.points(key, by)
            if where:
                drawn = True
                label = f"{name_of(run)}, " if len(runs) > 1 else ""
                label += key.replace("valid_loss", "validation").replace("/", ", ")
                valid_color = COLORS[1] if len(runs) == 1 else color
                axes.plot(where, losses, style, color=valid_color, markersize=4, label=label)
    if not drawn:
        return None
    if len(runs) == 1:
        _draw_baselines(runs[0], axes)
    axes.legend(fontsize=8)
    return figure_as_png(figure)


def value_figure(
    runs: Sequence[RunRecord], key: str, title: str, *, log: bool = False
) -> bytes | None:
    """One recorded value over steps, of one run or several.

    Args:
        runs: what to draw.
        key: the value's name in the metrics.
        title: what the axis says, with the unit.
        log: draw it on a logarithmic axis.

    Returns:
        A PNG image; None where nothing was recorded.
    """
    figure, axes = new_figure("step", title, size=(5.2, 3.0))
    drawn = False
    for number, run in enumerate(runs):
        steps, values = run.points(key)
        if steps:
            drawn = True
            color = COLORS[number % len(COLORS)]
            axes.plot(steps, values, color=color, linewidth=1.2, label=name_of(run))
    if not drawn:
        return None
    if log:
        from matplotlib.ticker import LogFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())  # 0.9, and not 9 x 10^-1
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    if len(runs) > 1:
        axes.legend(fontsize=7)
    return figure_as_png(figure)


def source_figure(runs: Sequence[RunRecord]) -> bytes | None:
    """The smoothed training loss of each source, of one run or several.

    Sources have colours, and runs have kinds of lines.

    Returns:
        A PNG image; None where no run told its sources apart.
    """
    keys = sorted({key for run in runs for key in run.keys_under("loss")})
    if not keys:
        return None
    figure, axes = new_figure("step", "loss (nats per token)", size=(5.2, 3.0))
    for style, run in zip(cycle(("-", "--", ":", "-.")), runs):
        for color, key in zip(cycle(COLORS), keys):
            steps, values = run.points(key)
            if steps:
                label = key.removeprefix("loss/")
                label = label if len(runs) == 1 else f"{name_of(run)}, {label}"
                axes.plot(steps, smoothed(values), style, color=color, linewidth=1.2, label=label)
    axes.legend(fontsize=7)
    return figure_as_png(figure)


def name_of(run: RunRecord) -> str:
    """What a run is called in figures and tables: its folder's name."""
    return absolute(run.folder).name


def _draw_baselines(run: RunRecord, axes: "Axes") -> None:
    by_loss = sorted(run.baselines.items(), key=lambda item: -item[1])
    for color, (name, value) in zip(BASELINE_COLORS, by_loss, strict=False):
        axes.axhline(value, color=color, linestyle="--", linewidth=1, label=f"{name} {value:.2f}")


def new_figure(x: str, y: str, size: tuple[float, float] = (8, 5)) -> "tuple[Figure, Axes]":
    """A figure with one pair of axes, and what they say; it needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def figure_as_png(figure: "Figure") -> bytes:
    """The figure as a PNG image."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return image.getvalue()
