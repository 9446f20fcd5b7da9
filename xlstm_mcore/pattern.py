"""The layer pattern: a tiny language that says which block comes where.

One letter is one layer; `|` cuts pipeline stages. The whole string is written out, so that a
configuration file shows the model as it is built:

>>> parse_pattern("mmsm|mmmm").letters
('m', 'm', 's', 'm', 'm', 'm', 'm', 'm')
>>> parse_pattern("mmsm|mmmm").stages
((0, 1, 2, 3), (4, 5, 6, 7))

The one abbreviation is the papers' name of a model, which is written out where it is read:

>>> spelled_out("xLSTM[1:1]x4")
'msms'

This module imports nothing heavy, so that a config can be checked without loading torch.
"""

import re
from dataclasses import dataclass

from xlstm_io.errors import UserError
from xlstm_mcore.sizes.presets import SLSTM_POSITIONS, classic_pattern

LETTERS = {
    "M": "7B-style mLSTM block with its feed-forward part",
    "m": "classic mLSTM block (up-projection around the cell)",
    "s": "classic sLSTM block with its gated feed-forward part",
    "l": "LSTM block: the sLSTM block with the LSTM's gates",
    "d": "Mamba-2 block",
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


_MOST_LAYERS = 1000  # a slip of the finger is not a gigabyte of letters
_NAME = re.compile(r"xLSTM\[(\d+):(\d+)\]x(\d+)")


def spelled_out(pattern: str) -> str:
    """The pattern with the papers' name of a model, such as `xLSTM[7:1]x48`, as letters.

    `xLSTM[a:b]xN` has N classic blocks, a mLSTM to b sLSTM. [7:1] has its sLSTM blocks where the
    first paper's models have them (`sizes.presets`), [1:1] every second block.

    Raises:
        PatternError: It looks like such a name, and no paper says where the sLSTM blocks are.
    """
    if not pattern.startswith("xLSTM"):
        return pattern
    match = _NAME.fullmatch(pattern)
    ratio, layers = (match[1], match[2]) if match else None, int(match[3]) if match else 0
    if ratio == ("1", "0") and 0 < layers <= _MOST_LAYERS:
        return "m" * layers
    if ratio == ("0", "1") and 0 < layers <= _MOST_LAYERS:
        return "s" * layers
    if ratio == ("1", "1") and 0 < layers <= _MOST_LAYERS and layers % 2 == 0:
        return "ms" * (layers // 2)
    if ratio == ("7", "1") and layers in SLSTM_POSITIONS:
        return classic_pattern(layers)
    depths = ", ".join(map(str, SLSTM_POSITIONS))
    raise PatternError(
        f"pattern='{shorten(pattern)}' is not a model of the papers; use xLSTM[1:0]xN or "
        f"xLSTM[0:1]xN with 1 to {_MOST_LAYERS} blocks, xLSTM[1:1]xN with an even number, "
        f"xLSTM[7:1]xN with N of {depths}, or give one letter per layer"
    )


def shorten(pattern: str) -> str:
    """The pattern for a message: cut in the middle where it is longer than 60 letters."""
    return pattern if len(pattern) <= 60 else f"{pattern[:28]}...{pattern[-28:]}"
