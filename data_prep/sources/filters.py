"""What is left out before packing: simple rules on a text, and functions of the user's own.

Every rule looks at one text alone, so its verdict does not depend on order, files or workers.
"""

import hashlib
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_prep.sources.documents import is_empty
from xlstm_io.errors import PrepError

_LETTERS = re.compile(r"[^\W\d_]+")
KEPT, EMPTY = 0, 1  # the first two verdicts; the filters' follow


@dataclass(frozen=True)
class TextFilters:
    """Rules for leaving texts out; the defaults keep every text. Shares are between 0 and 1.

    Attributes:
        min_chars: fewest characters.
        max_chars: most characters; 0: no limit.
        min_letter_share: fewest letters among the characters that are not white space.
        max_repeated_line_share: most lines that repeat an earlier line of the text, among the lines
            that are not blank.
        max_mean_word_chars: longest mean of the words' lengths; 0: no limit.
        functions: `module:function`, called with the text; true keeps it.
    """

    min_chars: int = 0
    max_chars: int = 0
    min_letter_share: float = 0.0
    max_repeated_line_share: float = 1.0
    max_mean_word_chars: float = 0.0
    functions: tuple[str, ...] = ()

    @property
    def reasons(self) -> list[str]:
        """The verdicts' names, by number."""
        rules = [field.name for field in fields(self)[:-1]]
        return ["kept", "empty", *rules, *self.functions]

    @property
    def chosen(self) -> dict[str, Any]:
        """The rules that are switched on, and the functions, by name; imports nothing."""
        rules = [(f.name, getattr(self, f.name), f.default) for f in fields(self)[:-1]]
        switched_on = {name: value for name, value, default in rules if value != default}
        return switched_on | dict.fromkeys(self.functions)

    def settings(self) -> dict[str, Any]:
        """The rules that are switched on, and the hash of each function's module.

        Raises:
            PrepError: a function cannot be imported.
        """
        return self.chosen | {name: _module_hash(name) for name in self.functions}

    def judge(self, text: str) -> int:
        """0 to keep a text, else the number of the reason why not."""
        if is_empty(text):
            return EMPTY
        verdicts = (
            len(text) < self.min_chars,
            0 < self.max_chars < len(text),
            self.min_letter_share > 0 and _letter_share(text) < self.min_letter_share,
            self.max_repeated_line_share < 1
            and _repeated_line_share(text) > self.max_repeated_line_share,
            0 < self.max_mean_word_chars < _mean_word_chars(text),
        )
        for number, dropped in enumerate(verdicts, EMPTY + 1):
            if dropped:
                return number
        for number, name in enumerate(self.functions, EMPTY + 1 + len(verdicts)):
            if not load_function(name)(text):
                return number
        return KEPT


def _letter_share(text: str) -> float:
    visible = sum(map(len, text.split()))
    return sum(map(len, _LETTERS.findall(text))) / visible if visible else 0.0


def _repeated_line_share(text: str) -> float:
    lines = [line for line in text.splitlines() if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def _mean_word_chars(text: str) -> float:
    words = text.split()
    return sum(map(len, words)) / len(words) if words else 0.0


@lru_cache
def load_function(name: str) -> Callable[[str], Any]:
    """Import `module:function`.

    Raises:
        PrepError: no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise PrepError(
            f"--filter-functions {name}: {error}; write module:function of a module on PYTHONPATH"
        ) from None
    if not callable(found):
        raise PrepError(f"--filter-functions {name}: not a function")
    return found


def _module_hash(name: str) -> str:
    load_function(name)
    file = importlib.import_module(name.partition(":")[0]).__file__
    if file is None:
        raise PrepError(f"--filter-functions {name}: its module has no file to hash")
    return f"sha256 {hashlib.sha256(Path(file).read_bytes()).hexdigest()}"
