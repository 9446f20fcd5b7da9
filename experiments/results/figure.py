"""The figure of a grid, as the paper's: one picture, drawn from its table."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.definition import Experiment, Figure
from experiments.results.rules import curve
from experiments.results.scaling import runs_of

_DARK = 0.7  # squares with a larger number have white letters


def draw(experiment: Experiment, table: Mapping[str, Any], path: Path) -> None:
    """Draw the best cells of a table into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    kind = experiment.figure.kind
    if kind == "positions":
        _positions(axes, experiment, table)
    elif kind == "bars":
        _bars(axes, experiment, table)
    elif kind == "squares":
        _squares(axes, experiment, table)
    elif kind == "frequencies":
        _frequencies(axes, experiment, table)
    elif kind == "sources":
        _sources(axes, experiment.figure, table)
    elif kind == "budgets":
        _budgets(axes, experiment.figure, table)
    else:
        _lines(axes, experiment.figure, table)
    axes.set_title(f"{table['title']} ({table['size']} size)", fontsize=10, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def _positions(axes: Any, experiment: Experiment, table: Mapping[str, Any]) -> None:
    """Scaled accuracy, or perplexity of text, over the position, a line per model."""
    measure = experiment.measures[experiment.figure.measure]
    longest = 1
    for model, rows in _best_rows(table):
        sets = [row["sets"][measure.set] for row in rows if measure.set in row.get("sets", {})]
        if not sets:
            continue
        groups = [group["from"] for group in sets[0]["by_position"]]
        means = [
            sum(s["by_position"][n][measure.value] for s in sets) / len(sets)
            for n in range(len(groups))
        ]
        if measure.value == "accuracy":
            chance = sets[0]["chance"]
            drawn = [(value - chance) / (1 - chance) for value in means]
        else:
            drawn = [math.exp(value) for value in means]
        axes.plot(groups, drawn, marker="o", markersize=3.5, label=model)
        longest = max(longest, *groups)
    lengths = {row["trained_to"] for _, rows in _best_rows(table) for row in rows}
    for length in lengths:
        axes.axvline(length, color="0.6", linewidth=0.8, linestyle="--", label="trained to here")
    if measure.value == "accuracy":
        axes.axhline(0, color="0.6", linewidth=0.8, linestyle=":", label="guess")
        axes.set_ylim(-0.12, 1.08)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.set_xscale("log", base=2)
    ticks = [2**n for n in range(int(math.log2(longest)) + 1)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("position, from")
    axes.set_ylabel(experiment.figure.label)
    axes.legend(frameon=False, fontsize=8)


def _frequencies(axes: Any, experiment: Experiment, table: Mapping[str, Any]) -> None:
    """Perplexity over how often the token is a target in training, a line per model."""
    measure = experiment.measures[experiment.figure.measure]
    for model, rows in _best_rows(table):
        lines = [row["sets"][measure.set]["by_frequency"] for row in rows]
        # Seeds have the same data, so their groups are the same.
        means = [
            sum(g["loss"] for g in groups) / len(groups) for groups in zip(*lines, strict=True)
        ]
        places = [group["from"] for group in lines[0]]
        axes.plot(places, [math.exp(m) for m in means], marker="o", markersize=3.5, label=model)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("times the token is a target in training, from")
    axes.set_ylabel(experiment.figure.label)
    axes.legend(frameon=False, fontsize=8)


def _sources(axes: Any, figure: Figure, table: Mapping[str, Any]) -> None:
    """Perplexity on each source, a mark per model, in the order of the first model."""
    rows = [row for row in table["best"] if row["by_source"]]
    names = sorted(rows[0]["by_source"], key=rows[0]["by_source"].get) if rows else []
    for row in rows:
        heights = [math.exp(row["by_source"][name]) for name in names]
        axes.plot(names, heights, marker="o", markersize=4, linestyle="", label=row["model"])
    axes.tick_params(axis="x", rotation=40, labelsize=8)
    axes.set_ylabel(figure.label)
    axes.legend(frameon=False, fontsize=8)


def _bars(axes: Any, experiment: Experiment, table: Mapping[str, Any]) -> None:
    """A bar per model and its values, with the deviation over seeds, and the paper's number.

    On a logarithmic axis it is a point, since such an axis has no 0 for a bar to begin at.
    """
    name = experiment.figure.measure
    rows = [row for row in table["best"] if name in row["mean"]]
    scaled = name in experiment.measures and experiment.measures[name].value == "accuracy"
    heights = [row["scaled"][name] if scaled else row["mean"][name] for row in rows]
    labels = ["\n".join([row["model"], *map(str, row["values"].values())]) for row in rows]
    labels = [label.replace(" ", "\n") if len(rows) > 4 else label for label in labels]
    errors = [row["std"].get(name, 0.0) / (1 - row["chance"] if scaled else 1.0) for row in rows]
    places, style = range(len(rows)), {"color": "#4477aa", "label": "here"}
    if experiment.figure.logarithmic:
        axes.errorbar(places, heights, yerr=errors, fmt="o", **style)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    else:
        axes.bar(places, heights, yerr=errors, width=0.7, **style)
    above = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 8}
    above["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the paper's line
    for place, height, error in zip(places, heights, errors, strict=True):
        axes.annotate(f"{height:.3g}", (place, height + error), **above)
    axes.margins(y=0.1)
    published = [experiment.published_for(row["model"], row["values"]) for row in rows]
    for place, number in enumerate(published):
        if number is not None:
            axes.plot([place - 0.35, place + 0.35], [number] * 2, color="#cc3311")
    if any(number is not None for number in published):
        axes.plot([], [], color="#cc3311", label="the paper, at its size and on its data")
        axes.legend(frameon=False, fontsize=8)
    axes.set_xticks(places, labels, fontsize=8 if len(rows) < 7 else 7)
    axes.set_ylabel(experiment.figure.label)


def _squares(axes: Any, experiment: Experiment, table: Mapping[str, Any]) -> None:
    """A square for each model and each of the data, with the number in it; the paper's below."""
    name = experiment.figure.measure
    rows = [row for row in table["best"] if name in row["scaled"]]
    models = list(dict.fromkeys(row["model"] for row in rows))
    data = list(dict.fromkeys(str(row["values"].get("data", "")) for row in rows))
    squares = [[float("nan")] * len(data) for _ in models]
    for row in rows:
        across = data.index(str(row["values"].get("data", "")))
        down = models.index(row["model"])
        squares[down][across] = row["scaled"][name]
        text = f"{row['scaled'][name]:.2f}".replace("-0.00", "0.00")
        number = experiment.published_for(row["model"], row["values"])
        text += "" if number is None else f"\n({number:.2f})"
        colour = "white" if row["scaled"][name] > _DARK else "black"
        axes.text(across, down, text, ha="center", va="center", fontsize=7, color=colour)
    axes.imshow(squares, vmin=0, vmax=1, cmap="YlGn", aspect="auto")
    axes.set_xticks(range(len(data)), data, rotation=40, ha="right", fontsize=7)
    axes.set_yticks(range(len(models)), models, fontsize=8)
    label = experiment.figure.label
    if experiment.published:
        label += "; in brackets the paper's, where it prints one"
    axes.set_xlabel(label, fontsize=8)


def _lines(axes: Any, figure: Figure, table: Mapping[str, Any]) -> None:
    """A line per model over an axis."""
    best = [row for row in table["best"] if figure.at.items() <= row["values"].items()]
    for model in dict.fromkeys(row["model"] for row in best):
        points = curve(best, model, figure.over, figure.measure)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, label=model)
    if figure.logarithmic:
        from matplotlib.ticker import LogFormatter

        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter())
    axes.set_xlabel(figure.over)
    axes.set_ylabel(figure.label)
    axes.legend(frameon=False, fontsize=8)


def _budgets(axes: Any, figure: Figure, table: Mapping[str, Any]) -> None:
    """The measure over parameters, a line per model and budget, and a star at each best size."""
    for n, (model, fit) in enumerate(table["fits"].items()):
        colour, label = f"C{n}", model
        runs = runs_of(table["best"], model, figure.measure)
        for budget in sorted({run.budget for run in runs}):
            line = sorted((run.parameters, run.loss) for run in runs if run.budget == budget)
            axes.plot(
                *zip(*line, strict=True), marker="o", markersize=3.5, color=colour, label=label
            )
            label = None
            axes.annotate(
                f"{budget:.0e} FLOPs".replace("e+", "e"),
                line[-1],
                textcoords="offset points",
                xytext=(5, -2),
                fontsize=7,
                color=colour,
            )
        for best in fit["optima"]:
            axes.plot(best["parameters"], best["loss"], marker="*", markersize=11, color=colour)
    axes.plot([], [], marker="*", linestyle="", color="0.4", label="best of a budget")
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.margins(x=0.12)
    axes.set_xlabel("parameters")
    axes.set_ylabel(figure.label)
    axes.legend(frameon=False, fontsize=8)


def _best_rows(table: Mapping[str, Any]) -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
    """The cells behind each row of the best, with its label."""
    found: list[tuple[str, Sequence[Mapping[str, Any]]]] = []
    for best in table["best"]:
        label = ", ".join([best["model"], *map(str, best["values"].values())])
        found.append(
            (
                label,
                [
                    row
                    for row in table["cells"]
                    if row["status"] == "done"
                    and row["model"] == best["model"]
                    and row["values"].get("lr") == best["lr"]
                    and best["values"].items() <= row["values"].items()
                ],
            )
        )
    return found
