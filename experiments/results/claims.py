"""Claims of the papers, each with the rule by which what was measured holds it or not."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

EXACT = 0.02
"""The largest standard error of an exponent that is compared with a published one."""
SOLVED, FAILED = 0.95, 0.1
"""Scaled accuracies: from the first on a task is solved, up to the second it is not."""


class Claim(BaseModel):
    """What the paper says, and the rule that decides.

    Rules:
        separates: the models of `solve` reach `SOLVED` on `measure`, those of `fail` stay below
            `FAILED`; accuracies are scaled, 0 is a guess and 1 is right.
        lower: `measure` of `model` is below that of `than` by more than chance makes
            (`experiments.results.chance`), on each of the data.
        slope: of log `measure` over log `over`, at most `at_most` and more than `more_than`.
        ratio: `measure` of `than` over that of `model` at the largest `over`, at least `at_least`.
        constant: the largest `measure` of `model` over the smallest is at most `at_most`.
        rises: the last `measure` of `model` over `over` exceeds the first by the factor `at_least`.
        below: every `measure` of `model` is at most `at_most`; of several seeds by more than
            chance makes.
        above: every `measure` of `model` is at least `at_least`, likewise.
        wins: the loss of `model` (of tasks the wrong answers) is below that of `than` on a share of
            the sources of every size, at least `at_least` or more than `more_than`.
        dominates: at every budget the lowest `measure` of `model` is below that of `than`.
        matters: the scaled `measure` of `model` differs more between the two data of `between` than
            between those of `against`, by more than chance makes.
        exponent: of the power law of the best parameters of `model` over the budget, from
            `at_least` to `at_most`; null where its standard error is above `EXACT`, or where it is
            outside by no more than chance makes.

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

    def _share(self) -> str:
        if self.more_than is not None:
            return f"more than {self.more_than:.1%}"
        return f">= {self.at_least:.1%}"

    def text(self) -> str:
        """The rule in words."""
        if self.rule == "separates":
            parts = [f"{' and '.join(self.solve)} >= {SOLVED}"] if self.solve else []
            parts += [f"{' and '.join(self.fail)} <= {FAILED}"] if self.fail else []
            return f"scaled accuracy of {self.measure}: {', '.join(parts)}"
        if self.rule == "lower":
            return f"{self.measure}: {self.model} below {self.than} by more than chance"
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
            return f"{self.model} below {self.than} on {self._share()} of the sources"
        if self.rule == "dominates":
            return f"{self.measure}: {self.model} below {self.than} at the best of every budget"
        if self.rule == "matters":
            assert self.between is not None and self.against is not None
            return (
                f"scaled {self.measure} of {self.model} differs more between "
                f"{' and '.join(self.between)} than between {' and '.join(self.against)}, by more "
                "than chance"
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
