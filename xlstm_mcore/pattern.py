"""The layer pattern: a tiny language that says which block comes where.

One letter is one layer; `|` cuts pipeline stages. The whole string is written out, without
repetition or abbreviation, so that a configuration file shows the model as it is built:

>>> parse_pattern("mmsm|mmmm").letters
('m', 'm', 's', 'm', 'm', 'm', 'm', 'm')
>>> parse_pattern("mmsm|mmmm").stages
((0, 1, 2, 3), (4, 5, 6, 7))

This module imports nothing heavy, so that a config can be checked without loading torch.
"""

from dataclasses import dataclass

from xlstm_io.errors import UserError

LETTERS = {
    "M": "7B-style mLSTM block with its feed-forward part",
    "m": "classic mLSTM block (up-projection around the cell)",
    "s": "classic sLSTM block with its gated feed-forward part",
    "*": "causal attention block with rotary positions and its feed-forward part",
}


class PatternError(UserError):
    """A pattern string does not describe a model; the message says value, rule and remedy."""


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern.

    Attributes:
        letters: The block letter of every layer, in order.
        stages: The global layer numbers of every pipeline stage (one stage without any `|`). With
            virtual stages, item `chunk * pipeline + rank` is model chunk `chunk` of that rank.
    """

    letters: tuple[str, ...]
    stages: tuple[tuple[int, ...], ...]


def parse_pattern(pattern: str) -> Pattern:
    """Read a pattern string.

    Raises:
        PatternError: The pattern or a pipeline stage is empty, or a letter is unknown.
    """
    known = ", ".join(LETTERS)
    if not pattern:
        raise PatternError(
            f"pattern='' does not name a layer; give one letter per layer, of {known}"
        )
    letters: list[str] = []
    stages: list[list[int]] = [[]]
    for position, letter in enumerate(pattern):
        if letter == "|":
            stages.append([])
        elif letter in LETTERS:
            stages[-1].append(len(letters))
            letters.append(letter)
        else:
            raise PatternError(
                f"pattern='{shorten(pattern)}' has '{letter}' at position {position}, which is "
                f"not a block; use {known}, and | to cut pipeline stages"
            )
    for number, stage in enumerate(stages):
        if not stage:
            raise PatternError(
                f"pattern='{shorten(pattern)}' leaves pipeline stage {number} without a layer; "
                "put at least one letter on both sides of every |"
            )
    return Pattern(tuple(letters), tuple(tuple(stage) for stage in stages))


def shorten(pattern: str, limit: int = 60) -> str:
    """The pattern for a message: cut in the middle where it is longer than `limit`."""
    if len(pattern) <= limit:
        return pattern
    half = (limit - 3) // 2
    return f"{pattern[:half]}...{pattern[-half:]}"
