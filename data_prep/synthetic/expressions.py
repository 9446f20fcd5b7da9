"""Formal languages of arithmetic with brackets, modulo 5.

The grammar is that of Deletang et al. 2023 (arXiv 2207.02098): an expression of one to four
symbols is a digit d, -d, (d) or (-d). A longer one is `(left operator right)`, where every length
of the left side is equally likely. All expressions grow at once, a level of brackets at a time.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_prep.synthetic.task import Samples, Task, at_the_end

MODULUS = 5
# Codes of symbols in an expression; a digit is its own code.
PLUS, MINUS, TIMES, OPEN, CLOSE = range(MODULUS, MODULUS + 5)
_SHORT = 4  # symbols of the longest expression without two sides


class _Level(NamedTuple):
    """The expressions of one depth, over all samples.

    Attributes:
        sides: bool: which of them have two sides; these are on the next level, all left sides
            before all right ones.
        operators: codes of those that have.
        values: of those that have not.
    """

    sides: np.ndarray
    operators: np.ndarray
    values: np.ndarray


def expressions(
    rng: np.random.Generator, lengths: np.ndarray, operators: int
) -> tuple[np.ndarray, np.ndarray]:
    """Random expressions with their values.

    Args:
        rng: draws.
        lengths: int64 `[n]`: symbols of each.
        operators: 2 for + and -, 3 for * as well.

    Returns:
        Codes `[n, largest length]`, -1 beyond the end, and the values `[n]`, below `MODULUS`.
    """
    codes = np.full((len(lengths), int(lengths.max())), -1)
    levels = []
    rows, starts, sizes = np.arange(len(lengths)), np.zeros_like(lengths), lengths
    while len(rows):
        level, (rows, starts, sizes) = _write_level(rng, codes, rows, starts, sizes, operators)
        levels.append(level)
    below = np.empty(0, np.int64)
    for level in reversed(levels):
        left, right = np.split(below, 2)
        below = level.values
        by = [level.operators == PLUS, level.operators == MINUS]
        below[level.sides] = np.select(by, [left + right, left - right], left * right) % MODULUS
    return codes, below


def _write_level(
    rng: np.random.Generator,
    codes: np.ndarray,
    rows: np.ndarray,
    starts: np.ndarray,
    sizes: np.ndarray,
    operators: int,
) -> tuple[_Level, tuple[np.ndarray, ...]]:
    """Write digits, signs, brackets and operators of some expressions.

    Returns:
        The level, and rows, starts and sizes of the next one.
    """
    sides = sizes > _SHORT
    brackets = sizes >= 3
    codes[rows[brackets], starts[brackets]] = OPEN
    codes[rows[brackets], (starts + sizes - 1)[brackets]] = CLOSE

    digits = rng.integers(0, MODULUS, len(rows))
    signed = ~sides & (sizes % 2 == 0)
    first = starts + (brackets & ~sides)
    codes[rows[signed], first[signed]] = MINUS
    codes[rows[~sides], (first + signed)[~sides]] = digits[~sides]
    values = np.where(signed, -digits, digits) % MODULUS

    rows, starts, sizes = rows[sides], starts[sides], sizes[sides]
    left = rng.integers(1, sizes - 3) if len(rows) else sizes
    chosen = rng.integers(PLUS, PLUS + operators, len(rows))
    codes[rows, starts + 1 + left] = chosen
    return _Level(sides, chosen, values), (
        np.concatenate([rows, rows]),
        np.concatenate([starts + 1, starts + 2 + left]),
        np.concatenate([left, sizes - 3 - left]),
    )


@dataclass(kw_only=True)
class ModArithmeticBrackets(Task):
    """The value of an expression with brackets, modulo 5; a sample ends in =."""

    rule = "at least two tokens"

    @property
    def chance(self) -> float:
        """A guess among the numbers."""
        return 1 / MODULUS

    def symbols(self) -> list[str]:
        """Padding, operators, and the numbers."""
        return ["_", "+", "-", "*", "=", "(", ")", *map(str, range(MODULUS))]

    def possible(self, length: int) -> bool:
        """Whether an expression precedes the equals sign."""
        return length >= 2

    def sample(self, rng: np.random.Generator, lengths: np.ndarray) -> Samples:
        """See `Task`."""
        codes, values = expressions(rng, lengths - 1, 3)
        ids = np.array([*range(7, 7 + MODULUS), 1, 2, 3, 5, 6, 0])  # the last one is for code -1
        tokens = np.zeros((len(lengths), int(lengths.max())), np.int32)
        tokens[:, :-1] = ids[codes]
        tokens[np.arange(len(lengths)), lengths - 1] = 4
        return Samples(tokens, at_the_end(values + 7, lengths), lengths)


@dataclass(kw_only=True)
class SolveEquation(Task):
    """The digit x of an equation with brackets, modulo 5; a sample ends in ACT.

    Multiplication is not used, as by Deletang et al.: an equation would have several solutions. It
    stays among the symbols, so that there are as many as the paper counts.
    """

    rule = "at least four tokens: an expression with x, =, its value, and ACT"

    @property
    def chance(self) -> float:
        """A guess among the numbers."""
        return 1 / MODULUS

    def symbols(self) -> list[str]:
        """Padding, operators, the unknown, the asking symbol, and the numbers."""
        return ["_", "+", "-", "*", "=", "(", ")", "x", "ACT", *map(str, range(MODULUS))]

    def possible(self, length: int) -> bool:
        """Whether there is room for x."""
        return length >= 4

    def sample(self, rng: np.random.Generator, lengths: np.ndarray) -> Samples:
        """See `Task`: the unknown is the first digit from a random place on, around the end."""
        rows, sizes = np.arange(len(lengths)), lengths - 3
        codes, values = expressions(rng, sizes, 2)
        digit = (codes >= 0) & (codes < MODULUS)
        later = digit & (np.arange(codes.shape[1]) >= rng.integers(0, sizes)[:, None])
        unknown = np.where(later.any(1), later.argmax(1), digit.argmax(1))
        solutions = codes[rows, unknown]
        ids = np.array([*range(9, 9 + MODULUS), 1, 2, 3, 5, 6, 0])
        tokens = np.zeros((len(rows), int(lengths.max())), np.int32)
        tokens[:, :-3] = ids[codes]
        tokens[rows, unknown] = 7
        tokens[rows, sizes], tokens[rows, sizes + 1], tokens[rows, sizes + 2] = 4, 9 + values, 8
        return Samples(tokens, at_the_end(9 + solutions, lengths), lengths)
