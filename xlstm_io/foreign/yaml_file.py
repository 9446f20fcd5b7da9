"""The one reader of YAML files: run files, and the files of `data_prep build`.

Stricter than YAML where YAML is silent: a key that is given twice is an error (YAML keeps the
last), and so is a file whose aliases would make millions of values out of a few lines.
"""

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from xlstm_io.errors import UserError
from xlstm_io.foreign.untrusted import LIMITS
from xlstm_io.storage import read_file

#: Most values of one file, each use of an alias counted in full. A run file has a few hundred.
MOST_VALUES = 100_000


class YAMLTextError(UserError):
    """A text breaks one of the rules of this module; the message says which."""


class YAMLSyntaxError(YAMLTextError):
    """A text is not YAML."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with a check of the nodes before values are made of them."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._counts: dict[yaml.Node, int | None] = {}

    def count_values(self, node: yaml.Node) -> int:
        """Values that a node stands for, each use of an alias in full; checks its keys, too."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        line = node.start_mark.line + 1
        if node in self._counts:
            count = self._counts[node]
            if count is None:
                raise YAMLTextError(f"line {line}: an alias refers to what it is part of")
            return count
        self._counts[node] = None  # being counted
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            self._check_keys([key for key, _ in node.value])
            parts = [part for pair in node.value for part in pair]
        self._counts[node] = total = 1 + sum(map(self.count_values, parts))
        return total

    def _check_keys(self, keys: list[yaml.Node]) -> None:
        seen: set[Hashable] = set()
        for node in keys:
            line = node.start_mark.line + 1
            if not isinstance(node, yaml.ScalarNode):
                raise YAMLTextError(f"line {line}: a key is a list or a mapping; use a word")
            merges = node.tag == "tag:yaml.org,2002:merge"
            key = node.value if merges else self.construct_object(node)
            if key in seen:
                raise YAMLTextError(f"line {line}: {key} is given twice; keep one")
            seen.add(key)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        YAMLSyntaxError: it is not YAML.
        YAMLTextError: it gives a key twice, refers to itself, or has more than `MOST_VALUES`
            values.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if loader.count_values(node) > MOST_VALUES:
                raise YAMLTextError(f"it has more than {MOST_VALUES:,} values; write less")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except UserError:
        raise
    except RecursionError:
        raise YAMLSyntaxError("not valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: a 13th month
        raise YAMLSyntaxError(f"not valid YAML: {_in_words(error)}") from error


def _in_words(error: Exception) -> str:
    """What is wrong with a text, in one line: yaml's own words point into a drawing of it."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    line, column = error.problem_mark.line + 1, error.problem_mark.column + 1
    context = error.context_mark.line + 1 if error.context_mark is not None else line
    since = f" ({error.context} that begins in line {context})" if context != line else ""
    remedy = "; indent with blanks" if "'\\t'" in str(error.problem) else ""
    return f"line {line}, column {column}: {error.problem}{since}{remedy}"


def read_yaml(
    path: str | os.PathLike[str], *, of: str, example: str, error: type[UserError] = UserError
) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Args:
        path: the file.
        of: what kind of file it is, for messages, such as `run file`.
        example: what such a file may hold, for messages.
        error: what is raised.

    Raises:
        UserError: of the class `error`: the file is missing, too large, not text, not YAML, or
            holds no keys.
    """
    try:
        text = read_file(Path(path), LIMITS.yaml, links=True).decode("utf-8-sig")
    except FileNotFoundError:
        raise error(f"{path} does not exist; give the path of a {of}") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path} cannot be read as text ({problem}); give a {of}") from problem
    try:
        values = parse_yaml(text)
    except YAMLTextError as problem:
        raise error(f"{path}: {problem}") from None
    if not isinstance(values, dict):
        raise error(f"{path} must hold keys and values; a {of} has keys such as {example}")
    return {str(name): value for name, value in values.items()}
