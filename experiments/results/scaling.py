"""Scaling laws from the runs of a grid over budgets and sizes (arXiv 2510.02228, section 3).

All runs of a budget take the same FLOPs, so a larger model sees fewer tokens. A parabola of the
loss over the logarithm of the size gives the best size of each budget. The best sizes of several
budgets follow a power law `N = A C^a` of the FLOPs `C`, and so do the best numbers of tokens.

The other way takes all runs at once: `L = E + A N^-a + B D^-b` of parameters `N` and tokens `D`
(arXiv 2203.15556, equation 2). The paper also fits it with a power over the sum of the two last
terms, which is left out here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

LEAST_SIZES = 3
"""Runs of a budget that a parabola needs, and budgets that a power law with an error needs."""

_EXPONENTS = np.linspace(0.05, 1.5, 30)
_ROUNDS = 4  # of a finer search around the best exponents
_WEIGHTINGS = 8
_FAR = 1e-3  # relative error of the loss, the paper's delta


@dataclass(frozen=True)
class Trained:
    """A run.

    Attributes:
        budget: its FLOPs.
        parameters: of the model.
        tokens: that it was trained on.
        loss: at its end, nats per token.
    """

    budget: float
    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Optimum:
    """The best that a budget can buy: parameters, tokens, and the loss there."""

    budget: float
    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class PowerLaw:
    """`y = factor x^exponent`.

    Attributes:
        factor: at x = 1.
        exponent: the slope in log-log.
        error: its standard error.
    """

    factor: float
    exponent: float
    error: float


@dataclass(frozen=True)
class LossLaw:
    """`L = floor + of_parameters N^-a + of_tokens D^-b`, and half of the runs are nearer to it.

    Attributes:
        floor: the loss of a model of any size on any number of tokens.
        of_parameters: the factor of `N^-a`.
        a: the exponent of parameters.
        of_tokens: the factor of `D^-b`.
        b: the exponent of tokens.
        error: the median of the relative errors.
    """

    floor: float
    of_parameters: float
    a: float
    of_tokens: float
    b: float
    error: float


def runs_of(best: Sequence[Mapping[str, Any]], model: str, measure: str) -> list[Trained]:
    """The runs of a model in the rows of the table of best cells, where they have a budget."""
    return [
        Trained(
            float(row["values"]["budget"]), row["parameters"], row["tokens"], row["mean"][measure]
        )
        for row in best
        if row["model"] == model and "budget" in row["values"] and measure in row["mean"]
    ]


def optima(runs: Sequence[Trained]) -> list[Optimum]:
    """The best size of each budget, in rising order, where it lies between sizes that were run."""
    found = []
    for budget in sorted({run.budget for run in runs}):
        of_budget = [run for run in runs if run.budget == budget]
        losses = [run.loss for run in of_budget]
        by_size = lowest([run.parameters for run in of_budget], losses)
        by_tokens = lowest([run.tokens for run in of_budget], losses)
        if by_size and by_tokens:
            found.append(Optimum(budget, by_size[0], by_tokens[0], by_size[1]))
    return found


def lowest(sizes: Sequence[float], losses: Sequence[float]) -> tuple[float, float] | None:
    """Where a parabola of the losses over log size is lowest, and its value there.

    None where that is not between the sizes, or there are fewer than `LEAST_SIZES` of them.
    """
    if len(set(sizes)) < LEAST_SIZES:
        return None
    x = np.log(sizes)
    middle = x.mean()  # around it the three powers are independent enough for fp64
    square, slope, value = np.polyfit(x - middle, losses, 2)
    if square <= 0:
        return None
    place = -slope / (2 * square)
    if not x.min() < place + middle < x.max():
        return None
    return math.exp(place + middle), float(value + slope * place / 2)


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """The power law through some points, by least squares in log-log; None for fewer than three."""
    if len(x) < LEAST_SIZES:
        return None
    log_x, log_y = np.log(x), np.log(y)
    away = log_x - log_x.mean()
    exponent = float(away @ log_y / (away @ away))
    start = float(log_y.mean() - exponent * log_x.mean())
    left = log_y - start - exponent * log_x
    error = math.sqrt(float(left @ left) / (len(x) - 2) / float(away @ away))
    return PowerLaw(math.exp(start), exponent, error)


def loss_law(runs: Sequence[Trained]) -> LossLaw | None:
    """The law of all runs; None where the runs do not determine it.

    Least squares of the relative error, in which runs that are off by more than `_FAR` count less:
    Huber's loss, as in the paper, by repeated weighting. It keeps runs of few steps from bending
    the law. For given exponents the law is linear in its other three numbers. So only the exponents
    are searched, on a grid that becomes finer around the best, and no starting point is chosen.
    """
    if len(runs) < 6 or len({run.budget for run in runs}) < 2:
        return None
    size, tokens, losses = (
        np.array([getattr(run, name) for run in runs]) for name in ("parameters", "tokens", "loss")
    )
    # Over their geometric means: powers of 1e9 would leave nothing to compute with.
    mean_size, mean_tokens = (math.exp(np.log(v).mean()) for v in (size, tokens))
    size, tokens = size / mean_size, tokens / mean_tokens
    weights = np.ones_like(losses)
    for _ in range(_WEIGHTINGS):
        found = _search(size, tokens, losses, weights)
        if found is None:
            return None
        a, b, numbers, off = found
        weights = np.sqrt(_FAR / np.maximum(_FAR, np.abs(off)))
    floor, of_size, of_tokens = map(float, numbers)
    return LossLaw(
        floor,
        of_size * mean_size**a,
        a,
        of_tokens * mean_tokens**b,
        b,
        float(np.median(np.abs(off))),
    )


def _search(
    size: np.ndarray, tokens: np.ndarray, losses: np.ndarray, weights: np.ndarray
) -> tuple[float, float, np.ndarray, np.ndarray] | None:
    """The best exponents, the other three numbers of the law, and the relative errors.

    A law has no number below zero. None where all exponents need one.
    """
    grid_a, grid_b = _EXPONENTS, _EXPONENTS
    best: tuple[float, float, float, np.ndarray, np.ndarray] | None = None
    for _ in range(_ROUNDS):
        for a in grid_a:
            for b in grid_b:
                columns = np.stack([np.ones_like(size), size**-a, tokens**-b], 1) / losses[:, None]
                weighted = columns * weights[:, None]
                numbers = np.linalg.lstsq(weighted, weights, rcond=None)[0]
                off = columns @ numbers - 1
                error = float(np.square(weights * off).sum())
                if (numbers >= 0).all() and (best is None or error < best[0]):
                    best = error, float(a), float(b), numbers, off
        if best is None:
            break
        step_a, step_b = grid_a[1] - grid_a[0], grid_b[1] - grid_b[0]
        grid_a = np.linspace(max(1e-3, best[1] - step_a), best[1] + step_a, 9)
        grid_b = np.linspace(max(1e-3, best[2] - step_b), best[2] + step_b, 9)
    return None if best is None else best[1:]


def fits(best: Sequence[Mapping[str, Any]], measure: str) -> dict[str, dict[str, Any]]:
    """By model: `optima`, the laws `parameters` and `tokens` of their budgets, and `loss`.

    A law is None where the runs do not determine it.

    Args:
        best: the rows of the table of best cells (`experiments.results.table`).
        measure: the loss, nats per token.
    """
    found = {}
    for model in dict.fromkeys(row["model"] for row in best):
        runs = runs_of(best, model, measure)
        points = optima(runs)
        budgets = [point.budget for point in points]
        laws = {
            "parameters": power_law(budgets, [point.parameters for point in points]),
            "tokens": power_law(budgets, [point.tokens for point in points]),
            "loss": loss_law(runs),
        }
        found[model] = {
            "optima": [asdict(point) for point in points],
            **{name: None if law is None else asdict(law) for name, law in laws.items()},
        }
    return found


def lines(fitted: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The fits as lines of Markdown."""
    found = []
    for model, fit in fitted.items():
        best = ", ".join(
            f"{o['parameters']:.3g} parameters and {o['tokens']:.3g} tokens at {o['budget']:.3g} "
            f"FLOPs (loss {o['loss']:.4g})"
            for o in fit["optima"]
        )
        found.append(f"- {model}, best of a budget: {best or 'at none it lies between the sizes'}")
        for name in ("parameters", "tokens"):
            if fit[name] is not None:
                law = PowerLaw(**fit[name])
                found.append(
                    f"- {model}: best {name} = {law.factor:.4g} C^{law.exponent:.4f} (standard "
                    f"error of the exponent {law.error:.2g})"
                )
        if fit["loss"] is not None:
            law_of = LossLaw(**fit["loss"])
            found.append(
                f"- {model}: loss = {law_of.floor:.3f} + {law_of.of_parameters:.4g} N^-"
                f"{law_of.a:.3f} + {law_of.of_tokens:.4g} D^-{law_of.b:.3f} "
                f"(half of the runs are nearer than {law_of.error:.2%})"
            )
    return found
