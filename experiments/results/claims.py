"""Claims of the papers, and the rules by which what was measured holds them or not.

A verdict is true, false, or null. It is null where the numbers do not decide: a cell is missing, a
difference is within its error, or a model has not even fitted its training data.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from experiments.results.scaling import LEAST_SIZES, optima, power_law, runs_of
from xlstm_io.terminal import counted

EXACT = 0.02
"""The largest standard error of an exponent that is compared with a published one."""
SOLVED, FAILED = 0.95, 0.1
"""Scaled accuracies: from the first on a task is solved, up to the second it is not."""


class Claim(BaseModel):
    """What the paper says, and the rule that decides.

    Rules:
        separates: the models of `solve` reach `SOLVED` on `measure`, those of `fail` stay below
            `FAILED`; accuracies are scaled, 0 is a guess and 1 is right.
        lower: `measure` of `model` is below that of `than` by more than two standard errors.
        slope: of log `measure` over log `over`, at most `at_most` and more than `more_than`.
        ratio: `measure` of `than` over that of `model` at the largest `over`, at least `at_least`.
        constant: the largest `measure` of `model` over the smallest is at most `at_most`.
        rises: the last `measure` of `model` over `over` exceeds the first by the factor `at_least`.
        below: every `measure` of `model` is at most `at_most`.
        above: every `measure` of `model` is at least `at_least`.
        wins: the loss of `model` (of tasks the wrong answers) is below that of `than` on a share of
            the sources, at least `at_least`.
        dominates: at every budget the lowest `measure` of `model` is below that of `than`.
        matters: the scaled `measure` of `model` differs more between the two data of `between` than
            between those of `against`, by more than two standard errors.
        exponent: of the power law of the best parameters of `model` over the budget, from
            `at_least` to `at_most`; null where its standard error is above `EXACT`.

    `at` restricts a rule to rows with these values on the axes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    claim: str
    where: str
    rule: Literal[
        "separates",
        "lower",
        "slope",
        "ratio",
        "constant",
        "rises",
        "below",
        "above",
        "wins",
        "dominates",
        "matters",
        "exponent",
    ]
    measure: str
    solve: list[str] = []
    fail: list[str] = []
    model: str | None = None
    than: str | None = None
    over: str | None = None
    at: dict[str, str | float] = {}
    between: tuple[str, str] | None = None
    against: tuple[str, str] | None = None
    at_most: float | None = None
    more_than: float | None = None
    at_least: float | None = None

    def concerns(self, cell: Mapping[str, Any]) -> bool:
        """Whether a cell of the table, done or not, is one that the rule reads."""
        values = cell["values"]
        data = (*(self.between or ()), *(self.against or ()))
        return (
            cell["model"] in (*self.solve, *self.fail, self.model, self.than)
            and self.at.items() <= values.items()
            and (not data or values.get("data") in data)
        )

    def text(self) -> str:
        """The rule in words."""
        if self.rule == "separates":
            parts = [f"{' and '.join(self.solve)} >= {SOLVED}"] if self.solve else []
            parts += [f"{' and '.join(self.fail)} <= {FAILED}"] if self.fail else []
            return f"scaled accuracy of {self.measure}: {', '.join(parts)}"
        if self.rule == "lower":
            return f"{self.measure}: {self.model} below {self.than} by over two standard errors"
        if self.rule == "ratio":
            return (
                f"{self.measure}: {self.than} over {self.model} >= {self.at_least:g} at the "
                f"largest {self.over}"
            )
        if self.rule == "constant":
            return f"{self.measure} of {self.model}: largest over smallest <= {self.at_most:g}"
        if self.rule == "below":
            return f"{self.measure} of {self.model} <= {self.at_most:g}"
        if self.rule == "above":
            return f"{self.measure} of {self.model} >= {self.at_least:g}"
        if self.rule == "wins":
            return f"{self.model} below {self.than} on >= {self.at_least:.1%} of the sources"
        if self.rule == "dominates":
            return f"{self.measure}: {self.model} below {self.than} at the best of every budget"
        if self.rule == "matters":
            assert self.between is not None and self.against is not None
            return (
                f"scaled {self.measure} of {self.model} differs more between "
                f"{' and '.join(self.between)} than between {' and '.join(self.against)}, by over "
                "two standard errors"
            )
        if self.rule == "exponent":
            return (
                f"exponent of the best parameters of {self.model} over the budget from "
                f"{self.at_least:g} to {self.at_most:g}"
            )
        if self.rule == "rises":
            return f"{self.measure} of {self.model}: last over first >= {self.at_least:g}"
        limits = [
            f"<= {self.at_most:g}" if self.at_most is not None else "",
            f"> {self.more_than:g}" if self.more_than is not None else "",
        ]
        slope = " and ".join(filter(None, limits))
        return f"slope of log {self.measure} of {self.model} over log {self.over} {slope}"


def verdict(
    claim: Claim,
    cells: Sequence[Mapping[str, Any]],
    best: Sequence[Mapping[str, Any]],
    enough_for: Sequence[str],
    trained: str | None,
) -> dict[str, Any]:
    """The verdict on one claim.

    Numbers of a model are judged when all its cells are done or have failed: another rate may be
    better than the best one so far, and another seed may change a mean.

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
        measured, holds, why = _separates(claim, best, missing, enough_for, trained)
    else:
        measured, holds, why = judges[claim.rule](claim, best)
        if holds is not None and missing:
            holds, why = None, "; ".join(_missing(*item) for item in missing.items())
    found = {
        "claim": claim.claim,
        "where": claim.where,
        "rule": claim.text(),
        "measured": measured,
        "holds": holds,
    }
    return found if holds is not None else found | {"why": why}


Judged = tuple[dict[str, Any], bool | None, str]


def _missing(model: str, cells: int) -> str:
    return f"{counted(cells, 'cell')} of {model} {'is' if cells == 1 else 'are'} missing"


def _separates(
    claim: Claim,
    best: Sequence[Mapping[str, Any]],
    missing: Mapping[str, int],
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
        if model in missing:
            open_.append(_missing(model, missing[model]))
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


def _lower(claim: Claim, best: Sequence[Mapping[str, Any]]) -> Judged:
    pair = [_rows(claim, best, model) for model in (claim.model, claim.than)]
    if not all(pair):
        return {}, None, "not both models are measured"
    ours, other = pair[0][0], pair[1][0]
    difference = other["mean"][claim.measure] - ours["mean"][claim.measure]
    if min(ours["n"], other["n"]) < 2:
        return {"difference": difference}, None, "one seed has no standard error"
    error = math.sqrt(sum(row["std"][claim.measure] ** 2 / row["n"] for row in (ours, other)))
    measured = {"difference": round(difference, 6), "standard error": round(error, 6)}
    if abs(difference) <= 2 * error:
        return measured, None, "the difference is within two standard errors"
    return measured, difference > 0, ""


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
    numbers = [row["mean"][claim.measure] for row in _rows(claim, best, claim.model)]
    if not numbers:
        return {}, None, f"{claim.model} is not measured"
    if claim.rule == "below":
        assert claim.at_most is not None
        return {"largest": max(numbers)}, max(numbers) <= claim.at_most, ""
    assert claim.at_least is not None
    return {"smallest": min(numbers)}, min(numbers) >= claim.at_least, ""


def _wins(claim: Claim, best: Sequence[Mapping[str, Any]]) -> Judged:
    pair = [_rows(claim, best, model) for model in (claim.model, claim.than)]
    if not all(pair):
        return {}, None, "not both models are measured"
    ours, other = (
        {
            (source, *map(str, row["values"].values())): loss
            for row in rows
            for source, loss in row.get("by_source", {}).items()
        }
        for rows in pair
    )
    shared = ours.keys() & other.keys()
    if not shared:
        return {}, None, "no source is measured by itself"
    assert claim.at_least is not None
    won = sum(ours[name] < other[name] for name in shared)
    return {"won": won, "sources": len(shared)}, won >= claim.at_least * len(shared), ""


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
    differences, variance = [], 0.0
    for pair in (claim.between, claim.against):
        assert pair is not None
        if not rows.keys() >= set(pair):
            return {}, None, f"{claim.model} is not measured on {' and '.join(pair)}"
        one, other = (rows[name] for name in pair)
        differences.append(abs(one["scaled"][claim.measure] - other["scaled"][claim.measure]))
        for row in (one, other):
            variance += (row["std"][claim.measure] / (1 - row["chance"])) ** 2 / row["n"]
    measured = dict(zip(("between", "against"), (round(d, 4) for d in differences), strict=True))
    if min(rows[name]["n"] for pair in (claim.between, claim.against) for name in pair or ()) < 2:
        return measured, None, "one seed has no standard error"
    ahead = differences[0] - differences[1]
    if abs(ahead) <= 2 * math.sqrt(variance):
        return measured, None, "the difference is within two standard errors"
    return measured, ahead > 0, ""


def _exponent(claim: Claim, best: Sequence[Mapping[str, Any]]) -> Judged:
    points = optima(runs_of(best, str(claim.model), claim.measure))
    law = power_law([p.budget for p in points], [p.parameters for p in points])
    if law is None:
        return {}, None, f"fewer than {LEAST_SIZES} budgets have their best between the sizes"
    assert claim.at_least is not None and claim.at_most is not None
    measured = {"exponent": round(law.exponent, 4), "standard error": round(law.error, 4)}
    if law.error > EXACT:
        return measured, None, "the runs do not determine the exponent"
    return measured, claim.at_least <= law.exponent <= claim.at_most, ""
