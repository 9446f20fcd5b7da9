"""ListOps of the Long Range Arena (arXiv 2011.04006): nested operations on lists of digits.

A node of the tree is an operation with probability 1/4, above the largest depth, and else a digit.
An operation has from two to `max_args` arguments. Trees with another number of tokens than asked
for are left out. All trees grow at once, a level at a time.
"""

from dataclasses import dataclass

import numpy as np

from data_prep.synthetic.task import Samples, Span, Task, at_the_end
from xlstm_io.errors import PrepError

_OPERATION_SHARE = 0.25
_TREES = 16  # are drawn for each that is asked for, since most have another length
_OPERATIONS = ("[MIN", "[MAX", "[MED", "[SM")
_CLOSE = 1 + len(_OPERATIONS)
_FIRST_DIGIT = _CLOSE + 1


@dataclass
class _Level:
    """The nodes of one depth; those of one parent are neighbours, and parents keep their order.

    Attributes:
        tree: the tree of each node.
        kinds: the place in `_OPERATIONS` of each, or -1 for a digit.
        values: of the nodes; of operations they follow from the level below.
        sizes: tokens of each node with what is below it, likewise.
        first_child: of each operation in the level below.
    """

    tree: np.ndarray
    kinds: np.ndarray
    values: np.ndarray
    sizes: np.ndarray
    first_child: np.ndarray


@dataclass(kw_only=True)
class ListOps(Task):
    """The value of nested operations on digits: MIN, MAX, MED (median) and SM (sum modulo 10)."""

    length: str = "501-1999"
    """Tokens of a sample: a number or a span. How often a length occurs follows from the trees."""
    samples: int = 96_000
    """Samples for training."""
    max_depth: int = 10
    """Depth of the deepest digit."""
    max_args: int = 10
    """Most arguments of an operation."""

    rule = "at least four tokens, and what depth and arguments allow"

    @property
    def chance(self) -> float:
        """A guess among the digits."""
        return 0.1

    def check(self) -> None:
        """See `Task`."""
        if self.max_depth < 2 or self.max_args < 2:
            raise PrepError(
                f"--max-depth {self.max_depth} --max-args {self.max_args}: both are at least 2"
            )

    def symbols(self) -> list[str]:
        """Padding, operations, their end, and the digits."""
        return ["_", *_OPERATIONS, "]", *map(str, range(10))]

    def possible(self, length: int) -> bool:
        """Whether a tree can have so many tokens, as far as depth and arguments say."""
        largest = 1
        for _ in range(self.max_depth - 1):
            if largest >= length:
                break
            largest = 2 + self.max_args * largest
        return 4 <= length <= largest

    def sample(self, rng: np.random.Generator, lengths: np.ndarray) -> Samples:
        """See `Task`; the lengths come out as `draw` says."""
        return self.draw(rng, len(lengths), Span(int(lengths.min()), int(lengths.max())))

    def draw(self, rng: np.random.Generator, count: int, span: Span) -> Samples:
        """About `count` trees with a length of the span, or fewer where such lengths are rare."""
        self.possible_lengths(span)
        levels = self._grow(rng, _TREES * count, span.high)
        _evaluate(levels)
        kept = (levels[0].sizes >= span.low) & (levels[0].sizes <= span.high)
        return _as_samples(levels, kept)

    def _grow(self, rng: np.random.Generator, count: int, most: int) -> list[_Level]:
        """Trees whose roots are operations; one with more than `most` tokens grows no further."""
        levels: list[_Level] = []
        sizes = np.zeros(count, np.int64)
        tree, depth = np.arange(count), 1
        while len(tree):
            operation = np.full(len(tree), depth == 1)
            if 1 < depth < self.max_depth:
                operation = (rng.random(len(tree)) < _OPERATION_SHARE) & (sizes[tree] <= most)
            kinds = np.where(operation, rng.integers(0, len(_OPERATIONS), len(tree)), -1)
            children = np.where(operation, rng.integers(2, self.max_args + 1, len(tree)), 0)
            sizes += np.bincount(tree, np.where(operation, 2, 1), count).astype(np.int64)
            first_child = (children.cumsum() - children)[operation]
            digits = rng.integers(0, 10, len(tree))
            levels.append(_Level(tree, kinds, digits, np.ones_like(tree), first_child))
            tree, depth = np.repeat(tree, children), depth + 1
        return levels


def _evaluate(levels: list[_Level]) -> None:
    """Fill in values and sizes of operations, from the deepest level up."""
    for level, below in zip(reversed(levels[:-1]), reversed(levels[1:]), strict=True):
        first = level.first_child
        if not len(first):
            continue
        operation = level.kinds >= 0
        level.sizes[operation] = 2 + np.add.reduceat(below.sizes, first)
        each = [
            np.minimum.reduceat(below.values, first),
            np.maximum.reduceat(below.values, first),
            _medians(below.values, first),
            np.add.reduceat(below.values, first) % 10,
        ]
        level.values[operation] = np.choose(level.kinds[operation], each)


def _medians(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The median of each group of neighbours, rounded down; groups begin at `first`."""
    counts = np.diff(first, append=len(values))
    group = np.repeat(np.arange(len(first)), counts)
    ascending = values[np.lexsort((values, group))]
    return (ascending[first + (counts - 1) // 2] + ascending[first + counts // 2]) // 2


def _as_samples(levels: list[_Level], kept: np.ndarray) -> Samples:
    """Write the kept trees as tokens, from their roots down."""
    lengths = levels[0].sizes[kept]
    row = np.cumsum(kept) - 1
    tokens = np.zeros((len(lengths), int(lengths.max(initial=1))), np.int32)
    place = np.zeros(len(kept), np.int64)
    for number, level in enumerate(levels):
        operation, written = level.kinds >= 0, kept[level.tree]
        rows = row[level.tree]
        digits = written & ~operation
        tokens[rows[digits], place[digits]] = _FIRST_DIGIT + level.values[digits]
        opened = written & operation
        tokens[rows[opened], place[opened]] = 1 + level.kinds[opened]
        tokens[rows[opened], (place + level.sizes - 1)[opened]] = _CLOSE
        if number + 1 < len(levels):
            below = levels[number + 1].sizes
            before = below.cumsum() - below
            counts = np.diff(level.first_child, append=len(below))
            start = place[operation] + 1 - before[level.first_child]
            place = np.repeat(start, counts) + before
    return Samples(tokens, at_the_end(_FIRST_DIGIT + levels[0].values[kept], lengths), lengths)
