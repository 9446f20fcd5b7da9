"""Digits as sequences of grey values: the toy of the Long Range Arena's images (arXiv 2011.04006).

An image is read row by row, a token for each pixel, and its class is the label of the last one. The
images are the 1,797 of 8 x 8 pixels that scikit-learn carries (Alpaydin and Kaynak, "Optical
Recognition of Handwritten Digits", UCI, https://doi.org/10.24432/C50P49, CC BY 4.0). Its file is
read where the package lies, and the package is not imported.
"""

import gzip
import zlib
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from data_prep.synthetic.task import Samples, Task, at_the_end
from xlstm_io.errors import PrepError

PIXELS = 64
GREYS = 17
CLASSES = 10
_FIRST_CLASS = 1 + GREYS
_PACKAGE = "sklearn"
_FILE = "datasets/data/digits.csv.gz"  # in the package


@dataclass(kw_only=True)
class Digits(Task):
    """The digit on an image of 8 x 8 pixels with 17 grey values; scikit-learn has the images."""

    length: str = str(PIXELS)
    """Tokens of a sample: all images have 64."""
    images: str | None = None
    """File of images (csv, or csv.gz): 64 grey values from 0 to 16 and the digit on each line.
    Default: that of the installed scikit-learn."""

    rule = f"images of {PIXELS} pixels"

    @property
    def chance(self) -> float:
        """A guess among the digits."""
        return 1 / CLASSES

    def check(self) -> None:
        """See `Task`; reads the file."""
        assert len(self._table)

    def symbols(self) -> list[str]:
        """Padding, grey values, and the digits."""
        return ["_", *(f"g{n}" for n in range(GREYS)), *map(str, range(CLASSES))]

    def possible(self, length: int) -> bool:
        """Whether images have so many pixels."""
        return length == PIXELS

    def sample(self, rng: np.random.Generator, lengths: np.ndarray) -> Samples:
        """See `Task`. All images come, in random order, before one comes again."""
        count, there = len(lengths), len(self._table)
        passes = [rng.permutation(there) for _ in range(-(-count // there))]
        chosen = self._table[np.concatenate(passes)[:count]]
        tokens = 1 + chosen[:, :PIXELS]
        return Samples(tokens, at_the_end(_FIRST_CLASS + chosen[:, PIXELS], lengths), lengths)

    @cached_property
    def _table(self) -> np.ndarray:
        """The file's numbers, int32 `[images, PIXELS + 1]`."""
        path = _shipped() if self.images is None else Path(self.images)
        try:
            raw = path.read_bytes()
            text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
            rows = [[int(number) for number in line.split(",")] for line in text.split()]
        except OSError as error:
            raise PrepError(f"{path} cannot be read: {error}") from error
        except (ValueError, EOFError, zlib.error) as error:
            raise PrepError(f"{path} is not a table of whole numbers: {error}") from error
        if {len(row) for row in rows} != {PIXELS + 1}:
            raise PrepError(f"{path}: a line has {PIXELS} grey values and a digit")
        grey, digits = range(GREYS), range(CLASSES)
        if any(
            number not in (grey if place < PIXELS else digits)
            for row in rows
            for place, number in enumerate(row)
        ):
            raise PrepError(
                f"{path}: grey values are from 0 to {GREYS - 1}, and digits from 0 to {CLASSES - 1}"
            )
        return np.array(rows, np.int32)


def _shipped() -> Path:
    """The file in scikit-learn's package.

    Raises:
        PrepError: the package is not installed.
    """
    found = find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise PrepError(
            "the images are in scikit-learn, which is not installed; run "
            "`pip install scikit-learn`, or name a file with --images"
        )
    return Path(found.origin).parent / _FILE
