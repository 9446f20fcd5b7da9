"""Formal languages that one symbol answers, after every prefix as well: counting and walking.

Definitions: arXiv 2405.04517, appendix B.1.1, and Deletang et al. 2023 (arXiv 2207.02098).
"""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from data_prep.synthetic.task import NONE, Samples, Task, at_the_end, inside

_MODULUS = 5
_POSITIONS = 5


@dataclass(kw_only=True)
class _Prefixes(Task):
    """A task whose answer is defined for every prefix of a sample."""

    dense: bool = False
    """Label every position with the answer so far, not only the last one."""

    @abstractmethod
    def answered(self, rng: np.random.Generator, rows: int, width: int) -> tuple[np.ndarray, ...]:
        """Tokens `[rows, width]`, and the answer so far at every position, or `NONE`."""

    def sample(self, rng: np.random.Generator, lengths: np.ndarray) -> Samples:
        """See `Task`."""
        width = int(lengths.max())
        tokens, answers = self.answered(rng, len(lengths), width)
        there = inside(lengths, width)
        labels = np.where(there, answers, NONE).astype(np.int32)
        if not self.dense:
            labels = at_the_end(answers[np.arange(len(lengths)), lengths - 1], lengths)
        return Samples(np.where(there, tokens, 0).astype(np.int32), labels, lengths)


class _TwoLetters(_Prefixes):
    """A task about a's and b's whose answer is one of the two."""

    @property
    def chance(self) -> float:
        """A guess between two letters."""
        return 0.5

    def symbols(self) -> list[str]:
        """Padding and the two letters."""
        return ["_", "a", "b"]


@dataclass(kw_only=True)
class Parity(_TwoLetters):
    """Whether the number of b's is even (a) or odd (b)."""

    def answered(self, rng: np.random.Generator, rows: int, width: int) -> tuple[np.ndarray, ...]:
        """See `_Prefixes`."""
        letters = rng.integers(1, 3, (rows, width))
        return letters, (letters == 2).cumsum(1) % 2 + 1


@dataclass(kw_only=True)
class EvenPairs(_TwoLetters):
    """Whether the number of ab and ba is even (a) or odd (b)."""

    def answered(self, rng: np.random.Generator, rows: int, width: int) -> tuple[np.ndarray, ...]:
        """See `_Prefixes`: the letter changes an even number of times if it is the first again."""
        letters = rng.integers(1, 3, (rows, width))
        return letters, np.where(letters == letters[:, :1], 1, 2)


@dataclass(kw_only=True)
class CycleNavigation(_Prefixes):
    """Where a walker on a cycle of five positions stands, who starts at P0."""

    @property
    def chance(self) -> float:
        """A guess among the positions."""
        return 1 / _POSITIONS

    def symbols(self) -> list[str]:
        """Padding, the three moves, and the positions."""
        return ["_", "STAY", "+1", "-1", *(f"P{n}" for n in range(_POSITIONS))]

    def answered(self, rng: np.random.Generator, rows: int, width: int) -> tuple[np.ndarray, ...]:
        """See `_Prefixes`."""
        moves = rng.integers(1, 4, (rows, width))
        steps = np.array([0, 0, 1, -1])[moves]
        return moves, steps.cumsum(1) % _POSITIONS + 4


@dataclass(kw_only=True)
class ModArithmetic(_Prefixes):
    """The value of numbers with +, - and * between them, modulo 5; a sample ends in =."""

    rule = "an even number of tokens: a number and an operator in turn"

    @property
    def chance(self) -> float:
        """A guess among the numbers."""
        return 1 / _MODULUS

    def symbols(self) -> list[str]:
        """Padding, operators, and the numbers."""
        return ["_", "+", "-", "*", "=", *map(str, range(_MODULUS))]

    def possible(self, length: int) -> bool:
        """Whether it is even."""
        return length >= 2 and length % 2 == 0

    def sample(self, rng: np.random.Generator, lengths: np.ndarray) -> Samples:
        """See `Task`: the last operator becomes the equals sign."""
        found = super().sample(rng, lengths)
        found.tokens[np.arange(len(found)), lengths - 1] = 4
        return found

    def answered(self, rng: np.random.Generator, rows: int, width: int) -> tuple[np.ndarray, ...]:
        """See `_Prefixes`; there is an answer at operators, which is the value of what precedes."""
        numbers = rng.integers(0, _MODULUS, (rows, width // 2))
        operators = rng.integers(1, 4, (rows, width // 2))
        tokens = np.stack([numbers + 5, operators], 2).reshape(rows, width)
        answers = np.full((rows, width), NONE)
        total, product = np.zeros(rows, np.int64), numbers[:, 0]  # product has the sign of its term
        for place in range(width // 2):
            if place:
                operator, number = operators[:, place - 1], numbers[:, place]
                times = operator == 3
                total = np.where(times, total, total + product) % _MODULUS
                product = np.where(times, product * number, np.where(operator == 1, 1, -1) * number)
                product %= _MODULUS
            answers[:, 2 * place + 1] = (total + product) % _MODULUS + 5
        return tokens, answers
