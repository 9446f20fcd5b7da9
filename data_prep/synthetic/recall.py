"""Tasks of memory: associative recall with many queries, and nearest-neighbour search."""

from dataclasses import dataclass

import numpy as np

from data_prep.synthetic.task import NONE, Samples, Task, inside
from xlstm_io.errors import PrepError


@dataclass(kw_only=True)
class MultiQueryRecall(Task):
    """Keys with their values, then the keys again: the label of a key is its value.

    The distribution is that of zoology (Arora et al., arXiv 2312.04927): the key number i of a
    sample is asked for at a place 2 g_i behind the pairs, and the g_i are drawn without replacement
    with probabilities proportional to (g + 1)^(power - 1). Between the queries stands padding.
    """

    length: str = "64"
    """Tokens of a sample."""
    pairs: int = 4
    """Pairs of a key and a value."""
    vocab_size: int = 8192
    """Ids: half of them are keys, half values."""
    power: float = 0.01
    """Exponent of the distances between pairs and queries; 1 is uniform."""

    rule = "an even number of tokens, at least four for each pair"

    @property
    def chance(self) -> float:
        """A guess among the values of the sample."""
        return 1 / self.pairs

    def check(self) -> None:
        """See `Task`: there are enough keys."""
        if self.vocab_size < 4 or not 1 <= self.pairs < self.vocab_size // 2:
            raise PrepError(
                f"--pairs {self.pairs} of --vocab-size {self.vocab_size}: from 1 to "
                f"{max(1, self.vocab_size // 2 - 1)} different keys can be had; change one of them"
            )
        if self.power <= 0:
            raise PrepError(f"--power {self.power}: must be positive")

    def symbols(self) -> list[str]:
        """Padding, keys and values."""
        keys = self.vocab_size // 2
        values = (f"v{n}" for n in range(self.vocab_size - keys))
        return ["_", *(f"k{n}" for n in range(1, keys)), *values]

    def possible(self, length: int) -> bool:
        """Whether all queries find a place."""
        return length % 2 == 0 and length >= 4 * self.pairs

    def sample(self, rng: np.random.Generator, lengths: np.ndarray) -> Samples:
        """See `Task`."""
        rows, width, context = len(lengths), int(lengths.max()), 2 * self.pairs
        first_value = self.vocab_size // 2
        keys = distinct(rng, rows, self.pairs, first_value - 1) + 1
        values = distinct(rng, rows, self.pairs, self.vocab_size - first_value) + first_value
        gaps = self._gaps(rng, (lengths - context) // 2)
        tokens = np.zeros((rows, width), np.int32)
        labels = np.full((rows, width), NONE, np.int32)
        tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
        np.put_along_axis(tokens, context + 2 * gaps, keys.astype(np.int32), 1)
        np.put_along_axis(labels, context + 2 * gaps, values.astype(np.int32), 1)
        return Samples(tokens, labels, lengths)

    def _gaps(self, rng: np.random.Generator, spaces: np.ndarray) -> np.ndarray:
        """`[n, pairs]`: for each sample different places below its space.

        The largest of log p + Gumbel noise, in falling order, are draws without replacement.
        """
        places = np.arange(int(spaces.max()))
        scores = (self.power - 1.0) * np.log(places + 1) + rng.gumbel(
            size=(len(spaces), len(places))
        )
        scores[~inside(spaces, len(places))] = -np.inf
        return np.argsort(-scores, axis=1, kind="stable")[:, : self.pairs]


def distinct(rng: np.random.Generator, rows: int, count: int, choices: int) -> np.ndarray:
    """Int64 `[rows, count]`: in each row different numbers below `choices`, in any order.

    Numbers that repeat an earlier one of their row are drawn again. No number is treated unlike
    another, so all rows of different numbers are equally likely.
    """
    found = rng.integers(0, choices, (rows, count))
    todo = np.arange(rows)
    while len(todo):
        part = found[todo]
        order = np.argsort(part, axis=1, kind="stable")
        ascending = np.take_along_axis(part, order, 1)
        repeats = np.zeros(part.shape, bool)
        np.put_along_axis(repeats, order[:, 1:], ascending[:, 1:] == ascending[:, :-1], 1)
        part[repeats] = rng.integers(0, choices, int(repeats.sum()))
        found[todo] = part
        todo = todo[repeats.any(1)]
    return found


@dataclass(kw_only=True)
class NearestNeighbour(Task):
    """The value of the vector nearest to the first one, so far: values must be revised.

    Vectors are unit vectors of two dimensions, that is, angles. A token is an angle and a value,
    each in one of several bins; the value of the first vector says nothing. From the second
    position on the label is the value of the nearest vector so far, of equally near ones the first
    (arXiv 2405.04517, figure 2 and appendix B).
    """

    length: str = "2-64"
    """Tokens of a sample: a number, or a span over which lengths are uniform."""
    samples: int = 8_192
    """Samples for training."""
    angles: int = 64
    """Bins of the angle."""
    values: int = 16
    """Bins of the value; the value of a bin is its middle in [0, 1]."""

    rule = "at least two tokens"

    @property
    def chance(self) -> float:
        """A guess among all values."""
        return 1 / self.values

    def check(self) -> None:
        """See `Task`."""
        if self.angles < 2 or self.values < 2:
            raise PrepError(
                f"--angles {self.angles} --values {self.values}: there must be two or more of each"
            )

    def symbols(self) -> list[str]:
        """Padding, the values as answers, and each angle with each value."""
        values = [f"v{n}" for n in range(self.values)]
        return ["_", *values, *(f"a{n}:{value}" for n in range(self.angles) for value in values)]

    def possible(self, length: int) -> bool:
        """Whether there is something to ask for."""
        return length >= 2

    def sample(self, rng: np.random.Generator, lengths: np.ndarray) -> Samples:
        """See `Task`."""
        rows, width = len(lengths), int(lengths.max())
        angles = rng.integers(0, self.angles, (rows, width))
        values = rng.integers(0, self.values, (rows, width))
        distance = np.abs(angles - angles[:, :1])
        distance = np.minimum(distance, self.angles - distance)
        # The smallest number is that of the nearest, and among equally near ones of the first.
        ranked = distance * width + np.arange(width)
        ranked[:, 0] = np.iinfo(np.int64).max
        nearest = np.minimum.accumulate(ranked, 1) % width
        labels = 1 + np.take_along_axis(values, nearest, 1)
        labels[:, 0] = NONE
        there = inside(lengths, width)
        tokens = np.where(there, 1 + self.values + angles * self.values + values, 0)
        return Samples(
            tokens.astype(np.int32), np.where(there, labels, NONE).astype(np.int32), lengths
        )
