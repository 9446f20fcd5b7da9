"""Formal languages over strings: sorting, counting, repeating, and a stack.

Definitions: arXiv 2405.04517, appendix B.1.1; the stack is that of Deletang et al. 2023
(arXiv 2207.02098): its content is given bottom first, and answered top first.
"""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from data_prep.synthetic.task import NONE, Samples, Task, at_the_end, inside

_DIGITS = 10
_WIDE = 63  # symbols of the counting tasks
_SET = 126
_STACK = 4


def with_answers(
    content: np.ndarray, sizes: np.ndarray, answers: np.ndarray, counts: np.ndarray, act: int | None
) -> Samples:
    """Samples of an input, a symbol that asks for the answer, and places for an answer.

    The first label stands at the asking symbol, or at the end of the input where there is none. The
    places of the further labels are padding.

    Args:
        content: `[n, width]`: inputs.
        sizes: `[n]`: their lengths.
        answers: `[n, at least the largest count]`.
        counts: `[n]`: symbols of each answer.
        act: id of the asking symbol.
    """
    rows = np.arange(len(sizes))
    first = sizes if act is not None else sizes - 1
    lengths = first + counts
    width = int(lengths.max())
    tokens = np.zeros((len(rows), width), np.int32)
    taken = min(width, content.shape[1])
    tokens[:, :taken] = np.where(inside(sizes, taken), content[:, :taken], 0)
    if act is not None:
        tokens[rows, sizes] = act
    labels = np.full((len(rows), width), NONE, np.int32)
    given = inside(counts, answers.shape[1])
    row, place = np.nonzero(given)
    labels[row, first[row] + place] = answers[given]
    return Samples(tokens, labels, lengths)


@dataclass(kw_only=True)
class BucketSort(Task):
    """The symbols of a string in their order."""

    rule = "an odd number of tokens: a string, and the places of all answers but the first"

    @property
    def chance(self) -> float:
        """A guess among the ten symbols."""
        return 1 / _DIGITS

    def symbols(self) -> list[str]:
        """Padding and the ten symbols."""
        return ["_", *map(str, range(_DIGITS))]

    def possible(self, length: int) -> bool:
        """Whether it is odd."""
        return length % 2 == 1

    def sample(self, rng: np.random.Generator, lengths: np.ndarray) -> Samples:
        """See `Task`."""
        sizes = (lengths + 1) // 2
        content = rng.integers(1, _DIGITS + 1, (len(sizes), int(sizes.max())))
        beyond = np.where(inside(sizes, content.shape[1]), content, _DIGITS + 1)
        return with_answers(content, sizes, np.sort(beyond, 1), sizes, None)


@dataclass(kw_only=True)
class MissingDuplicate(Task):
    """The symbol that is masked where a string is repeated."""

    rule = "an even number of tokens"

    @property
    def chance(self) -> float:
        """A guess among the nine symbols."""
        return 1 / (_DIGITS - 1)

    def symbols(self) -> list[str]:
        """Padding, the mask, and nine symbols."""
        return ["_", "MIS", *map(str, range(_DIGITS - 1))]

    def possible(self, length: int) -> bool:
        """Whether it is even."""
        return length >= 2 and length % 2 == 0

    def sample(self, rng: np.random.Generator, lengths: np.ndarray) -> Samples:
        """See `Task`."""
        rows, sizes, width = np.arange(len(lengths)), lengths // 2, int(lengths.max())
        content = rng.integers(2, _DIGITS + 1, (len(rows), width))
        places = np.arange(width)
        again = np.where(places < sizes[:, None], places, places - sizes[:, None])
        tokens = np.take_along_axis(content, np.clip(again, 0, None), 1)
        masked = sizes + rng.integers(0, sizes)
        answers = tokens[rows, masked]
        tokens[rows, masked] = 1
        tokens[~inside(lengths, width)] = 0
        return Samples(tokens.astype(np.int32), at_the_end(answers, lengths), lengths)


@dataclass(kw_only=True)
class _Rearranged(Task):
    """A string of digits, then ACT; the answer is the same digits in another order."""

    rule = "an even number of tokens: a string, ACT, and the places of all answers but the first"

    @property
    def chance(self) -> float:
        """A guess among the ten digits."""
        return 1 / _DIGITS

    def symbols(self) -> list[str]:
        """Padding, the asking symbol, and the digits."""
        return ["_", "ACT", *map(str, range(_DIGITS))]

    def possible(self, length: int) -> bool:
        """Whether it is even."""
        return length >= 2 and length % 2 == 0

    @abstractmethod
    def order(self, places: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Which digit of a string each answer is.

        Args:
            places: `[1, width]`: of the answers.
            sizes: `[n, 1]`: lengths of the strings.
        """

    def sample(self, rng: np.random.Generator, lengths: np.ndarray) -> Samples:
        """See `Task`."""
        sizes = lengths // 2
        width = int(sizes.max())
        content = rng.integers(2, _DIGITS + 2, (len(sizes), width))
        order = self.order(np.arange(width)[None], sizes[:, None])
        answers = np.take_along_axis(content, np.clip(order, 0, width - 1), 1)
        return with_answers(content, sizes, answers, sizes, 1)


@dataclass(kw_only=True)
class Repetition(_Rearranged):
    """A string again."""

    def order(self, places: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """See `_Rearranged`."""
        return np.broadcast_to(places, (len(sizes), places.shape[1]))


@dataclass(kw_only=True)
class ReverseString(_Rearranged):
    """A string from its end."""

    def order(self, places: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """See `_Rearranged`."""
        return sizes - 1 - places


@dataclass(kw_only=True)
class OddsFirst(_Rearranged):
    """First the symbols number 1, 3, 5, ... of a string, then the others."""

    def order(self, places: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """See `_Rearranged`."""
        odd = (sizes + 1) // 2
        return np.where(places < odd, 2 * places, 2 * (places - odd) + 1)


@dataclass(kw_only=True)
class OrderedSet(Task):
    """The different symbols of a string, in the order in which they came."""

    rule = "at most as many tokens as asked for, an even number: an answer may be shorter"

    @property
    def chance(self) -> float:
        """A guess among all symbols."""
        return 1 / _SET

    def symbols(self) -> list[str]:
        """Padding, the asking symbol, and the symbols."""
        return ["_", "ACT", *map(str, range(_SET))]

    def possible(self, length: int) -> bool:
        """Whether it is even."""
        return length >= 2 and length % 2 == 0

    def sample(self, rng: np.random.Generator, lengths: np.ndarray) -> Samples:
        """See `Task`."""
        sizes = lengths // 2
        width = int(sizes.max())
        content = rng.integers(2, _SET + 2, (len(sizes), width))
        order = np.argsort(content, axis=1, kind="stable")
        ascending = np.take_along_axis(content, order, 1)
        new = np.ones(content.shape, bool)
        np.put_along_axis(new, order[:, 1:], ascending[:, 1:] != ascending[:, :-1], 1)
        new &= inside(sizes, width)
        answers = np.take_along_axis(content, np.argsort(~new, axis=1, kind="stable"), 1)
        return with_answers(content, sizes, answers, new.sum(1), 1)


@dataclass(kw_only=True)
class StackManipulation(Task):
    """What lies on a stack after some operations, from its top."""

    rule = "at most as many tokens as asked for, an even number from 4 on"

    @property
    def chance(self) -> float:
        """A guess among the four symbols."""
        return 1 / _STACK

    def symbols(self) -> list[str]:
        """Padding, two operations, the symbols, and an operation that pushes each of them."""
        digits = list(map(str, range(_STACK)))
        return ["_", "ACT", "POP", *digits, *(f"PUSH{digit}" for digit in digits)]

    def possible(self, length: int) -> bool:
        """Whether a symbol, an operation and two answers have a place."""
        return length >= 4 and length % 2 == 0

    def sample(self, rng: np.random.Generator, lengths: np.ndarray) -> Samples:
        """See `Task`: what ends as an empty stack is left out."""
        rows, sizes = np.arange(len(lengths)), lengths // 2
        width = int(sizes.max())
        depth = rng.integers(1, sizes)
        given = depth.copy()
        digits = rng.integers(3, 3 + _STACK, (len(rows), width))
        actions = rng.integers(0, 1 + _STACK, (len(rows), width))
        push = actions > 0
        operations = np.where(push, 2 + _STACK + actions, 2)
        places = np.arange(width)
        content = np.where(places < given[:, None], digits, operations)
        stack = np.where(places < given[:, None], digits, 0)
        for place in range(width):
            acts = (place >= given) & (place < sizes)
            pushes = acts & push[:, place]
            stack[rows[pushes], depth[pushes]] = 2 + actions[pushes, place]
            depth = np.where(pushes, depth + 1, np.where(acts, np.maximum(depth - 1, 0), depth))
        order = np.clip(depth[:, None] - 1 - places, 0, width - 1)
        answers = np.take_along_axis(stack, order, 1)
        kept = depth > 0
        return with_answers(content[kept], sizes[kept], answers[kept], depth[kept], 1)


@dataclass(kw_only=True)
class Majority(Task):
    """The symbol that occurs most often; of several the first in the order of symbols."""

    @property
    def chance(self) -> float:
        """A guess among all symbols."""
        return 1 / _WIDE

    def symbols(self) -> list[str]:
        """Padding and the symbols, which are numbers."""
        return ["_", *map(str, range(_WIDE))]

    def counted(self, counts: np.ndarray) -> np.ndarray:
        """The answer, from how often each symbol occurs, `[n, symbols]`."""
        return 1 + counts.argmax(1)

    def sample(self, rng: np.random.Generator, lengths: np.ndarray) -> Samples:
        """See `Task`."""
        width = int(lengths.max())
        content = rng.integers(0, _WIDE, (len(lengths), width))
        there = inside(lengths, width)
        cells = (content + _WIDE * np.arange(len(lengths))[:, None])[there]
        counts = np.bincount(cells, minlength=_WIDE * len(lengths)).reshape(-1, _WIDE)
        tokens = np.where(there, content + 1, 0).astype(np.int32)
        return Samples(tokens, at_the_end(self.counted(counts), lengths), lengths)


@dataclass(kw_only=True)
class MajorityCount(Majority):
    """How often the most frequent symbol occurs; the largest number stands for more, too."""

    def counted(self, counts: np.ndarray) -> np.ndarray:
        """See `Majority`."""
        return 1 + np.minimum(counts.max(1), _WIDE - 1)
