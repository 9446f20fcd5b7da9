"""The table of a grid: a row for every cell, done or not, and the best of them by model."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.definition import groups, written
from experiments.grid import Grid
from experiments.results import scaling
from experiments.results.rules import verdict
from pretrain.watching import provenance
from xlstm_io.storage import write_atomic

TABLE_FILE, TEXT_FILE = "table.json", "table.md"
VERDICT_FILE, FIGURE_FILE = "verdict.json", "figure.png"
NOT_STARTED = "not started"


def make(grid: Grid) -> dict[str, Any]:
    """The table of a grid, from the results that there are."""
    rows = [_row(grid, cell) for cell in grid.cells]
    best, dates = best_of(grid, rows), _different(rows, "date")
    table: dict[str, Any] = {
        "experiment": grid.name,
        "size": grid.size_name,
        "title": grid.experiment.title,
        "source": grid.experiment.source,
        "code": provenance.code(),
        "versions": provenance.versions(),
        "machine": "; ".join(_different(rows, "machine")),
        "date": " to ".join(dict.fromkeys(dates[:1] + dates[-1:])),
        "cells": rows,
        "best": best,
    }
    if "budget" in grid.size.axes:
        table["fits"] = scaling.fits(best, str(grid.experiment.choose))
    return table


def _different(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """What the cells have under a key, each once; a report may be made elsewhere, and later."""
    return sorted({row[key] for row in rows if key in row})


def _row(grid: Grid, cell: Any) -> dict[str, Any]:
    row = {"number": cell.number, "model": cell.model, "values": dict(cell.values)}
    changed, result = grid.changed(cell), grid.result(cell)
    if changed:
        reason = f"it began with other settings than now: {', '.join(changed)}"
        return row | {"status": "missing", "reason": reason}
    if result is not None:
        return row | {k: v for k, v in result.items() if k not in ("cell", "number")}
    owner = grid.claim(cell).owner()
    reason = f"at work: {owner}" if owner else grid.last_attempt(cell) or NOT_STARTED
    return row | {"status": "missing", "reason": reason}


def best_of(grid: Grid, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each model the rate with the best mean of `choose`, and its measures over the seeds.

    A rate counts if any of its seeds is done. The mean of those that survived says little of a
    rate at which others failed, so one at which fewer failed goes first. A model without a rate is
    one group.
    """
    found = []
    for model, values in groups(grid.cells):
        mine = [
            row for row in rows if row["model"] == model and values.items() <= row["values"].items()
        ]
        by_rate: dict[Any, list[Mapping[str, Any]]] = {}
        failed: Counter[Any] = Counter()
        for row in mine:
            rate = row["values"].get("lr")
            if row["status"] == "done":
                by_rate.setdefault(rate, []).append(row)
            failed[rate] += row["status"] == "failed"
        if not by_rate:
            continue
        rate = max(by_rate, key=lambda lr: (-failed[lr], _worth(grid, by_rate[lr])))
        chosen = by_rate[rate]
        found.append(
            {
                "model": model,
                "values": values,
                "lr": rate,
                "n": len(chosen),
                "failed": failed[rate],
                "mean": _over(chosen, "measures", statistics.fmean),
                "std": _over(chosen, "measures", _deviation),
                "scaled": _over(chosen, "scaled", statistics.fmean),
                "by_source": _over(chosen, "by_source", statistics.fmean),
                "chance": chosen[0].get("chance"),
                "parameters": chosen[0].get("parameters"),
                "tokens": chosen[0].get("tokens"),
                "state_bytes": chosen[0].get("state_bytes"),
            }
        )
    return found


def _worth(grid: Grid, rows: Sequence[Mapping[str, Any]]) -> float:
    """The mean of the measure that rates are chosen by; larger is better."""
    name = grid.experiment.choose
    if name is None:
        return 0.0
    mean = statistics.fmean(row["measures"][name] for row in rows)
    if not math.isfinite(mean):  # nothing is larger than NaN, so the first rate would win
        return -math.inf
    return mean if grid.experiment.measures[name].value == "accuracy" else -mean


def _over(rows: Sequence[Mapping[str, Any]], key: str, function: Any) -> dict[str, float]:
    names = rows[0].get(key, {})
    return {name: function([row[key][name] for row in rows]) for name in names}


def _deviation(values: Sequence[float]) -> float:
    if not all(map(math.isfinite, values)):  # which `statistics` cannot compute with
        return math.nan
    return statistics.stdev(values) if len(values) > 1 else 0.0


def verdicts(grid: Grid, table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The verdicts on the experiment's claims that name models of this size."""
    models = set(grid.size.models)
    trained = grid.experiment.choose
    found = []
    for claim in grid.experiment.claims:
        named = {*claim.solve, *claim.fail, *filter(None, (claim.model, claim.than))}
        if named <= models:
            found.append(
                verdict(claim, table["cells"], table["best"], grid.size.enough_for, trained)
            )
    return found


def write(grid: Grid) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write table.json, table.md, verdict.json and figure.png; table and verdicts."""
    from experiments.results.figure import draw

    table = make(grid)
    judged = verdicts(grid, table)
    grid.folder.mkdir(parents=True, exist_ok=True)
    for name, value in ((TABLE_FILE, table), (VERDICT_FILE, judged)):
        text = json.dumps(value, indent=1)
        write_atomic(grid.folder / name, text.encode() + b"\n")
    write_atomic(grid.folder / TEXT_FILE, as_markdown(grid, table, judged).encode())
    if table["best"]:
        draw(grid.experiment, table, grid.folder / FIGURE_FILE)
    return table, judged


def as_markdown(grid: Grid, table: Mapping[str, Any], judged: Sequence[Mapping[str, Any]]) -> str:
    """The table of the best cells, the verdicts, and the cells that are missing or failed."""
    measures = list(dict.fromkeys(name for row in table["best"] for name in row["mean"]))
    values = list(dict.fromkeys(key for row in table["best"] for key in row["values"]))
    scaled = any(row["scaled"] for row in table["best"])
    head = ["model", *values, "rate", "n", *measures]
    head += [*(f"{name}, scaled" for name in measures), "guess"] if scaled else []
    published = [grid.experiment.published_for(r["model"], r["values"]) for r in table["best"]]
    compared = any(number is not None for number in published)
    head += ["the paper"] if compared else []
    lines = [
        f"# {grid.name}, {grid.size_name}: {table['title']}",
        "",
        f"{table['source']}. {_when_and_where(table)}",
        "",
        _line(head),
        _line(["---"] * len(head)),
    ]
    for row, number in zip(table["best"], published, strict=True):
        cells = [row["model"], *(written(row["values"].get(key, "")) for key in values)]
        cells += ["" if row["lr"] is None else f"{row['lr']:g}", str(row["n"])]
        cells += [_number(row["mean"].get(name), row["std"].get(name)) for name in measures]
        if scaled:
            cells += [_number(row["scaled"].get(name)) for name in measures]
            cells.append(_number(row["chance"]))
        cells += [_number(number)] if compared else []
        lines.append(_line(cells))
    if "fits" in table:
        lines += ["", *scaling.lines(table["fits"])]
    lines += ["", *(f"- {verdict_line(item)}" for item in judged)]
    open_ = [row for row in table["cells"] if row["status"] != "done"]
    new = [str(row["number"]) for row in open_ if row["reason"] == NOT_STARTED]
    if open_:
        lines += ["", f"{len(open_)} of {len(table['cells'])} cells have no numbers:", ""]
    for row in open_:
        if row["reason"] != NOT_STARTED:
            named = ", ".join(
                [row["model"], *(f"{k} {written(v)}" for k, v in row["values"].items())]
            )
            lines.append(f"- {row['number']} ({named}): {row['status']}, {row['reason']}")
    lines += [f"- {NOT_STARTED}: {', '.join(new)}"] if new else []
    return "\n".join(lines) + "\n"


def _when_and_where(table: Mapping[str, Any]) -> str:
    if not table["best"]:
        return "Nothing is measured yet."
    return f"Measured on {table['date']}, {table['machine']}."


def verdict_line(item: Mapping[str, Any]) -> str:
    """A verdict as one line."""
    word = {True: "holds", False: "does not hold", None: "not decided"}[item["holds"]]
    numbers = ", ".join(f"{k} {v:.3g}" for k, v in item["measured"].items()) or "nothing"
    why = f"; {item['why']}" if item.get("why") else ""
    return f"{word}: {item['claim']} ({item['where']}; {item['rule']}; measured: {numbers}{why})"


def _number(value: float | None, deviation: float | None = None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" + (f" ± {deviation:.2g}" if deviation else "")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
