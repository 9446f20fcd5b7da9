"""What every synthetic task is: its settings, its symbols, and how its samples are drawn.

A sample is a short sequence with labels at some of its positions. The answers stand in the labels
alone. Where an answer has several symbols, the input holds padding in their places: "Red tokens are
evaluated for loss and accuracy metrics, but are padded for the input" (arXiv 2405.04517, B.1.1).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import numpy as np

from data_prep.options import Words
from xlstm_io.errors import PrepError

_LONGEST = 1 << 20
NONE = -1
"""What stands in `Samples.labels` for a position without a label."""


@dataclass(frozen=True)
class Samples:
    """Some samples, filled up to the same width.

    Attributes:
        tokens: int32 `[n, width]`, 0 (padding, in every task) beyond the end of a sample.
        labels: int32 `[n, width]`, `NONE` where there is none.
        lengths: int64 `[n]`.
    """

    tokens: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, chosen: np.ndarray | slice) -> "Samples":
        """Some of the samples."""
        return Samples(self.tokens[chosen], self.labels[chosen], self.lengths[chosen])


class Span(NamedTuple):
    """Lengths of samples, in tokens: from `low` to `high`."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, option: str) -> Self:
        """The span that `3-40` or `64` means.

        Raises:
            PrepError: it means none.
        """
        low, dash, high = text.partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise PrepError(f"{option} {text}: write a length such as 64, or a span such as 3-40")
        span = cls(int(low), int(high) if dash else int(low))
        if not 1 <= span.low <= span.high:
            raise PrepError(f"{option} {text}: the first length is at least 1 and not the larger")
        if span.high > _LONGEST:
            raise PrepError(f"{option} {text}: a sample has at most {_LONGEST} tokens")
        return span

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(kw_only=True)
class Task(ABC):
    """A task and its settings; the fields are the options of the command line.

    Attributes:
        rule: which lengths are possible, for messages.
    """

    rule: ClassVar[str] = "any number of tokens"

    out: Path
    """Folder for the corpora."""
    length: str = "3-40"
    """Tokens of a sample: a number, or a span over which lengths are uniform."""
    samples: int = 100_000
    """Samples for training."""
    validation_samples: int = 2_000
    """Samples of each validation split."""
    validation_length: Words = field(default_factory=list)
    """Further lengths to validate on: each becomes a folder of its own."""
    seed: int = 0
    """Another seed gives other samples."""
    seq_len: int | None = None
    """Tokens of a row, which holds several samples; default: the largest length."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Accuracy of a guess among the answers that can stand there."""

    @abstractmethod
    def symbols(self) -> list[str]:
        """The symbol of each id; the first is that of padding."""

    @abstractmethod
    def sample(self, rng: np.random.Generator, lengths: np.ndarray) -> Samples:
        """Samples of these lengths, or somewhat shorter ones where `rule` says so.

        Fewer may come back: those that are not worth asking for are left out.
        """

    def possible(self, length: int) -> bool:
        """Whether there are samples of this length."""
        return length >= 1

    def check(self) -> None:
        """Check the settings of the task itself; most tasks have none.

        Raises:
            PrepError: they contradict each other.
        """
        return

    def possible_lengths(self, span: Span) -> np.ndarray:
        """The lengths in a span for which there are samples.

        Raises:
            PrepError: there are none.
        """
        found = np.array([n for n in range(span.low, span.high + 1) if self.possible(n)], np.int64)
        if not len(found):
            raise PrepError(f"there are no samples of {span} tokens: the task has {self.rule}")
        return found

    def draw(self, rng: np.random.Generator, count: int, span: Span) -> Samples:
        """About `count` samples whose lengths are uniform over the possible ones of a span."""
        return self.sample(rng, rng.choice(self.possible_lengths(span), count))


def inside(lengths: np.ndarray, width: int) -> np.ndarray:
    """Bool `[n, width]`: whether a position lies in its sample."""
    return np.arange(width) < lengths[:, None]


def at_the_end(answers: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Labels int32 `[n, width]` with the answer of each sample at its last position.

    Args:
        answers: `[n]`.
        lengths: `[n]`.
    """
    labels = np.full((len(lengths), int(lengths.max(initial=1))), NONE, np.int32)
    labels[np.arange(len(lengths)), lengths - 1] = answers
    return labels
