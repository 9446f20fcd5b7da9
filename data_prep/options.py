"""Options of a command from its dataclass, with errors in one line.

tyro reads the options and writes the help. It draws its errors as boxes, and its words are a
program's (`invalid literal for int() with base 10`). They are said again here as every other
message of the project: value, rule, remedy.
"""

import contextlib
import io
import re
from pathlib import Path
from typing import Annotated, Any

import tyro

from xlstm_io.errors import PrepError


def default_hint(default: str) -> str:
    """What the help says of a default, where tyro would show an empty one as `(default: )`."""
    return f"(default: {default or 'none'})"


_SHOWN = tyro.conf.arg(help_behavior_hint=default_hint)
Words = Annotated[list[str], _SHOWN]
"""Type of an option that takes any number of words."""
Paths = Annotated[list[Path], _SHOWN]
"""Type of an option that takes any number of paths."""


def parse(kind: type, arguments: list[str], prog: str, description: str | None = None) -> Any:
    """An instance of `kind` from the words of a command line.

    Raises:
        PrepError: an option is missing, unknown, or has a value of another type.
        SystemExit: help was asked for and printed.
    """
    said = io.StringIO()
    # tyro draws the boxes that are read here only where stdout takes them.
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(output):
            return tyro.cli(kind, args=arguments, prog=prog, description=description)
    except SystemExit as end:
        if end.code in (0, None):  # the help, drawn again for the stdout that there is
            tyro.cli(kind, args=arguments, prog=prog, description=description)
        message = _in_one_line(said.getvalue())
    raise PrepError(f"{message}; `{prog} --help` lists the options")


def _in_one_line(box: str) -> str:
    """What a box of tyro's says."""
    inside = [line[1:].rstrip().removesuffix("│") for line in box.splitlines() if line[:1] == "│"]
    parts: list[list[str]] = [[]]
    for line in inside:
        if line.strip(" ─"):
            parts[-1].append(line.rstrip())
        else:
            parts.append([])
    first = parts[0]
    text = " ".join(line.strip() for line in first)
    if text.startswith("Missing from"):
        # Four more spaces before an option than before the title, and eight before its help.
        names = [line.split()[0] for line in first[1:] if re.match(r" {4,6}\S", line)]
        return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing"
    if text.startswith("Unrecognized options:"):
        unknown = text.removeprefix("Unrecognized options:").strip().split(", ")[0]
        meant = [line.split()[0] for part in parts[1:] for line in part if "--" in line[:8]]
        hint = f"; did you mean {meant[0].rstrip(',')}?" if meant else ""
        return f"there is no option {unknown}{hint}"
    for pattern, words in _WORDS:
        found = re.match(pattern, text)
        if found:
            return found.expand(words)
    return text.removesuffix(".")


_WORDS = (
    (r"Error parsing (\S+?): invalid literal for int\(\).*: (.*)", r"\1 \2: not a whole number"),
    (r"Error parsing (\S+?): could not convert string to float: (.*)", r"\1 \2: not a number"),
    (
        r"invalid choice (.*?) for argument '(.*?)'\. Expected one of \((.*?),?\)\.?$",
        r"\2 \1: must be one of \3",
    ),
    (r"Missing value for argument '(.*?)'\..*", r"\1 needs a value"),
)
