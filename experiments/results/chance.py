"""Whether a difference of means over seeds is more than chance makes: Student's t, two sides, 95 %.

With two seeds each the bound is 4.3 standard errors. Two standard errors would call one of five
differences real that are none.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # by degrees of freedom


def student(degrees: int) -> float:
    """How many standard errors are chance; for more than ten degrees the bound of ten is taken."""
    return _STUDENT[min(degrees, len(_STUDENT)) - 1]


class Mean(NamedTuple):
    """A mean over seeds as a part of a sum.

    Attributes:
        factor: what it is multiplied with.
        value: the mean.
        std: the standard deviation over the seeds (of the sample: n - 1).
        n: seeds.
    """

    factor: float
    value: float
    std: float
    n: int


class Sum(NamedTuple):
    """A sum of means.

    Attributes:
        value: the sum.
        error: its standard error; None where a mean is of one seed.
        bound: from how far from 0 on it is no chance; None likewise.
    """

    value: float
    error: float | None
    bound: float | None

    @property
    def sign(self) -> bool | None:
        """Whether it is above 0 (True) or below (False); None where that may be chance."""
        if self.bound is None or abs(self.value) <= self.bound:
            return None
        return self.value > 0


def summed(means: Sequence[Mean]) -> Sum:
    """The sum of means, each of other runs."""
    value = sum(mean.factor * mean.value for mean in means)
    if min(mean.n for mean in means) < 2:
        return Sum(value, None, None)
    error = math.sqrt(sum((mean.factor * mean.std) ** 2 / mean.n for mean in means))
    return Sum(value, error, student(sum(mean.n - 1 for mean in means)) * error)
