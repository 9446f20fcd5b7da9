"""What a plan says of a layout. Nothing here needs torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.config import RunConfig
from pretrain.planning.layouts import Layout


@dataclass(frozen=True)
class Estimate:
    """A layout's memory and the bound on its speed.

    Attributes:
        memory: bytes by kind at the peak of the fullest rank.
        seconds: of a step, by what they go to.
        tokens_per_second: of all GPUs together.
        mfu: the share of the GPUs' dense rate that the model's own work takes.
        free: bytes that are left on the fullest GPU beside the reserve; below 0 it does not fit.
    """

    memory: Mapping[str, float]
    seconds: Mapping[str, float]
    tokens_per_second: float
    mfu: float
    free: float


@dataclass(frozen=True)
class Tried:
    """A layout that was looked at.

    Attributes:
        layout: which.
        config: the run with it; None where the run cannot have it.
        estimate: of that run; None likewise.
        why_not: why it cannot be used; empty where it can.
    """

    layout: Layout
    config: RunConfig | None = None
    estimate: Estimate | None = None
    why_not: str = ""


def ranked(tried: list[Tried]) -> list[Tried]:
    """Those that fit, the fastest first, and then those that do not, the smallest first."""

    def key(one: Tried) -> tuple:
        if one.estimate is None:
            return (2,)
        if one.why_not:
            return 1, -one.estimate.free
        return 0, -one.estimate.tokens_per_second

    return sorted(tried, key=key)
