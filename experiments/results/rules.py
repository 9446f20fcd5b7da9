"""The rules of claims on the tables of a grid.

A verdict is true, false, or null. It is null where the numbers do not decide: a cell is missing, a
difference may be chance, or a model has not even fitted its training data.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.results.chance import Mean, student, summed
from experiments.results.claims import EXACT, FAILED, SOLVED, Claim
from experiments.results.scaling import LEAST_SIZES, optima, power_law, runs_of
from xlstm_io.terminal import counted

ONE_SEED = "one seed has no standard error"
MAY_BE_CHANCE = "the difference may be chance, by Student's t"


def verdict(
    claim: Claim,
    cells: Sequence[Mapping[str, Any]],
    best: Sequence[Mapping[str, Any]],
    enough_for: Sequence[str],
    trained: str | None,
) -> dict[str, Any]:
    """The verdict on one claim.

    Numbers of a model are judged when all its cells are done or have failed: another rate may be
    better than the best one so far, and another seed may change a mean. The mean of the seeds that
    survived is not judged where others failed at the same rate, nor what is left of several data.

    Args:
        claim: the claim.
        cells: the rows of the table of all cells (`experiments.results.table`).
        best: the rows of the table of best cells.
        enough_for: models that the size is known to be enough for.
        trained: the measure of the training lengths, scaled, that says whether a model has fitted.

    Returns:
        `claim`, `where`, `rule`, `measured`, `holds`, and `why` where it is null.
    """
    best = [row for row in best if claim.concerns(row)]
    missing = Counter(
        cell["model"] for cell in cells if cell["status"] == "missing" and claim.concerns(cell)
    )
    open_: dict[str, list[str]] = defaultdict(list)
    for model, cells_missing in missing.items():
        verb = "is" if cells_missing == 1 else "are"
        open_[model].append(f"{counted(cells_missing, 'cell')} of {model} {verb} missing")
    for row in best:
        if row.get("failed"):
            open_[row["model"]].append(
                f"{counted(row['failed'], 'run')} of {row['model']} failed at its best rate"
            )
        value = row.get("mean", {}).get(claim.measure, 0.0)
        if not math.isfinite(value):  # it is neither above nor below anything
            open_[row["model"]].append(f"{claim.measure} of {row['model']} is {value}")
    for cell in cells:
        if cell["status"] == "failed" and claim.concerns(cell) and not _has_row(cell, best):
            open_[cell["model"]] = [f"all runs of {cell['model']} failed{_at(cell)}"]
    judges = {
        "lower": _lower,
        "slope": _slope,
        "ratio": _ratio,
        "constant": _constant,
        "rises": _rises,
        "below": _bounded,
        "above": _bounded,
        "wins": _wins,
        "dominates": _dominates,
        "matters": _matters,
        "exponent": _exponent,
    }
    if claim.rule == "separates":
        measured, holds, why = _separates(claim, best, open_, enough_for, trained)
    else:
        measured, holds, why = judges[claim.rule](claim, best)
        if holds is not None and open_:
            holds, why = None, "; ".join(why for reasons in open_.values() for why in reasons)
    found = {
        "claim": claim.claim,
        "where": claim.where,
        "rule": claim.text(),
        "measured": measured,
        "holds": holds,
    }
    return found if holds is not None else found | {"why": why}


def _group(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in cell["values"].items() if key not in ("lr", "seed")}


def _has_row(cell: Mapping[str, Any], best: Sequence[Mapping[str, Any]]) -> bool:
    group = _group(cell).items()
    return any(row["model"] == cell["model"] and group <= row["values"].items() for row in best)


def _at(cell: Mapping[str, Any]) -> str:
    return "".join(f", {key} {value}" for key, value in _group(cell).items())


Judged = tuple[dict[str, Any], bool | None, str]


def _separates(
    claim: Claim,
    best: Sequence[Mapping[str, Any]],
    unfinished: Mapping[str, Sequence[str]],
    enough_for: Sequence[str],
    trained: str | None,
) -> Judged:
    measured: dict[str, Any] = {}
    refuted, open_ = False, []
    for model in (*claim.solve, *claim.fail):
        rows = [row for row in best if row["model"] == model]
        numbers = [row["scaled"].get(claim.measure) for row in rows]
        if not rows or None in numbers:
            open_.append(f"{model} is not measured")
            continue
        measured[model] = round(min(numbers) if model in claim.solve else max(numbers), 4)
        if model in unfinished:
            open_ += unfinished[model]
        elif model in claim.fail:
            refuted |= measured[model] > FAILED
        elif measured[model] < SOLVED:
            fitted = trained is None or all(row["scaled"][trained] >= SOLVED for row in rows)
            if fitted or model in enough_for:
                refuted = True
            else:
                open_.append(f"{model} has not fitted its training data")
    if refuted:
        return measured, False, ""
    return measured, None if open_ else True, "; ".join(open_)


def _rows(claim: Claim, best: Sequence[Mapping[str, Any]], model: str | None) -> list[Any]:
    return [row for row in best if row["model"] == model and claim.measure in row["mean"]]


def _values(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key} {value}" for key, value in row["values"].items())


def _lower(claim: Claim, best: Sequence[Mapping[str, Any]]) -> Judged:
    """On each of the data, where there are several."""
    ours, other = (
        {_values(row): row for row in _rows(claim, best, model)}
        for model in (claim.model, claim.than)
    )
    if not ours or ours.keys() != other.keys():
        return {}, None, "not both models are measured"
    ahead = [
        summed([_mean(claim, other[at]), _mean(claim, ours[at])._replace(factor=-1.0)])
        for at in ours
    ]
    least = min(ahead, key=lambda one: one.value)
    measured = {"difference": round(least.value, 6)}
    if least.error is None:
        return measured, None, ONE_SEED
    measured["standard error"] = round(least.error, 6)
    signs = {one.sign for one in ahead}
    if False in signs:
        return measured, False, ""
    return measured, None if None in signs else True, MAY_BE_CHANCE


def _mean(claim: Claim, row: Mapping[str, Any]) -> Mean:
    return Mean(1.0, row["mean"][claim.measure], row["std"][claim.measure], row["n"])


def curve(
    best: Sequence[Mapping[str, Any]], model: str | None, over: str | None, measure: str
) -> list[tuple[float, float]]:
    """`(value of the axis, measure)` of a model, in rising order of the axis."""
    points = [
        (float(row["values"][over]), float(row["mean"][measure]))
        for row in best
        if row["model"] == model and over in row["values"] and measure in row["mean"]
    ]
    return sorted(points)


def slope_of(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of log y over log x, of the upper half of the points, at least three.

    Small sizes are ruled by what each call costs; the law shows at large ones.
    """
    points = points[-max(3, (len(points) + 1) // 2) :]
    x, y = ([math.log(p[k]) for p in points] for k in (0, 1))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    rise = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return rise / sum((a - mean_x) ** 2 for a in x)


def _slope(claim: Claim, best: Sequence[Mapping[str, Any]]) -> Judged:
    points = curve(best, claim.model, claim.over, claim.measure)
    if len(points) < 3:
        return {}, None, "fewer than three sizes are measured"
    slope = slope_of(points)
    holds = (claim.at_most is None or slope <= claim.at_most) and (
        claim.more_than is None or slope > claim.more_than
    )
    return {"slope": round(slope, 3)}, holds, ""


def _ratio(claim: Claim, best: Sequence[Mapping[str, Any]]) -> Judged:
    ours, other = (
        dict(curve(best, model, claim.over, claim.measure)) for model in (claim.model, claim.than)
    )
    shared = sorted(ours.keys() & other.keys())
    if not shared:
        return {}, None, "the two have no size in common"
    assert claim.at_least is not None
    ratio = other[shared[-1]] / ours[shared[-1]]
    return {"at": shared[-1], "ratio": round(ratio, 2)}, ratio >= claim.at_least, ""


def _constant(claim: Claim, best: Sequence[Mapping[str, Any]]) -> Judged:
    points = [y for _, y in curve(best, claim.model, claim.over, claim.measure)]
    if len(points) < 2:
        return {}, None, "fewer than two sizes are measured"
    assert claim.at_most is not None
    ratio = max(points) / min(points)
    return {"largest over smallest": round(ratio, 3)}, ratio <= claim.at_most, ""


def _rises(claim: Claim, best: Sequence[Mapping[str, Any]]) -> Judged:
    points = [y for _, y in curve(best, claim.model, claim.over, claim.measure)]
    if len(points) < 2:
        return {}, None, "fewer than two sizes are measured"
    assert claim.at_least is not None
    ratio = points[-1] / points[0]
    return {"last over first": round(ratio, 3)}, ratio >= claim.at_least, ""


def _bounded(claim: Claim, best: Sequence[Mapping[str, Any]]) -> Judged:
    """A limit needs no error: one seed is judged as it is, and several by their mean and chance."""
    rows = _rows(claim, best, claim.model)
    if not rows:
        return {}, None, f"{claim.model} is not measured"
    factor, limit = (-1.0, claim.at_most) if claim.rule == "below" else (1.0, claim.at_least)
    assert limit is not None
    least = min(rows, key=lambda row: factor * row["mean"][claim.measure])
    measured = {"largest" if factor < 0 else "smallest": least["mean"][claim.measure]}
    signs = set()
    for row in rows:
        mean = _mean(claim, row)
        inside = summed([mean._replace(value=factor * (mean.value - limit))])
        signs.add(inside.value >= 0 if inside.error is None else inside.sign)
    if False in signs:
        return measured, False, ""
    return measured, None if None in signs else True, MAY_BE_CHANCE


def _wins(claim: Claim, best: Sequence[Mapping[str, Any]]) -> Judged:
    """At every size, where there are several."""
    ours, other = (
        {_values(row): row.get("by_source", {}) for row in _rows(claim, best, model)}
        for model in (claim.model, claim.than)
    )
    if not ours or ours.keys() != other.keys():
        return {}, None, "not both models are measured"
    counts = []
    for at in ours:
        shared = ours[at].keys() & other[at].keys()
        if not shared:
            return {}, None, "no source is measured by itself"
        counts.append((sum(ours[at][name] < other[at][name] for name in shared), len(shared)))
    won, sources = map(sum, zip(*counts, strict=True))
    measured = {"won": won, "sources": sources}
    if len(counts) > 1:
        measured["least share"] = round(min(a / b for a, b in counts), 4)
    enough = (
        (claim.at_least is None or a >= claim.at_least * b)
        and (claim.more_than is None or a > claim.more_than * b)
        for a, b in counts
    )
    return measured, all(enough), ""


def _dominates(claim: Claim, best: Sequence[Mapping[str, Any]]) -> Judged:
    ours, other = (
        {point.budget: point.loss for point in optima(runs_of(best, model, claim.measure))}
        for model in (str(claim.model), str(claim.than))
    )
    shared = sorted(ours.keys() & other.keys())
    if not shared:
        return {}, None, "at no budget the best of both lies between the sizes that were run"
    ahead = [other[budget] - ours[budget] for budget in shared]
    measured = {"least ahead": round(min(ahead), 4), "most ahead": round(max(ahead), 4)}
    if min(ahead) <= 0 < max(ahead):
        return measured, None, "it is ahead at some budgets only"
    if len(shared) < LEAST_SIZES:
        return measured, None, f"fewer than {LEAST_SIZES} budgets can be compared"
    return measured, min(ahead) > 0, ""


def _matters(claim: Claim, best: Sequence[Mapping[str, Any]]) -> Judged:
    rows = {row["values"].get("data"): row for row in _rows(claim, best, claim.model)}
    differences: list[float] = []
    factors: Counter[str] = Counter()  # the two differences may share one of the data
    for sign, pair in ((1, claim.between), (-1, claim.against)):
        assert pair is not None
        if not rows.keys() >= set(pair):
            return {}, None, f"{claim.model} is not measured on {' and '.join(pair)}"
        low, high = sorted(pair, key=lambda name: rows[name]["scaled"][claim.measure])
        differences.append(rows[high]["scaled"][claim.measure] - rows[low]["scaled"][claim.measure])
        factors[high] += sign
        factors[low] -= sign
    measured = dict(zip(("between", "against"), (round(d, 4) for d in differences), strict=True))
    ahead = summed(
        [
            Mean(
                factor,
                rows[name]["scaled"][claim.measure],
                rows[name]["std"][claim.measure] / (1 - rows[name]["chance"]),
                rows[name]["n"],
            )
            for name, factor in factors.items()
            if factor
        ]
    )
    return measured, ahead.sign, ONE_SEED if ahead.error is None else MAY_BE_CHANCE


def _exponent(claim: Claim, best: Sequence[Mapping[str, Any]]) -> Judged:
    points = optima(runs_of(best, str(claim.model), claim.measure))
    law = power_law([p.budget for p in points], [p.parameters for p in points])
    if law is None:
        return {}, None, f"fewer than {LEAST_SIZES} budgets have their best between the sizes"
    assert claim.at_least is not None and claim.at_most is not None
    measured = {"exponent": round(law.exponent, 4), "standard error": round(law.error, 4)}
    if law.error > EXACT:
        return measured, None, "the runs do not determine the exponent"
    outside = max(claim.at_least - law.exponent, law.exponent - claim.at_most)
    if 0 < outside <= student(len(points) - 2) * law.error:
        return measured, None, MAY_BE_CHANCE
    return measured, outside <= 0, ""
