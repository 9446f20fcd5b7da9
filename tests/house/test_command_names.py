"""Messages, help texts and documents spell a command in one way: `python -m PACKAGE COMMAND`.

Every option of a command says what it is.
"""

import argparse
import re
import subprocess
from pathlib import Path

import pytest

import experiments.cli
import pretrain.cli
import slurm.cli
import xlstm_mcore.convert.cli

ROOT = Path(__file__).parents[2]
# The console scripts, which pyproject.toml alone defines. `xlstm-pretrain` is also the name of the
# project and stands in the formats of files: only followed by a command it is the script.
SCRIPT = re.compile(
    r"xlstm-data|xlstm-convert|xlstm-slurm|xlstm-experiments|prog=f?\"xlstm-pretrain|program\(\"xlstm-pretrain"
    r"|xlstm-pretrain`?:? (launch|train|check|self-test|show|generate|evaluate)\b"
    r"|xlstm-pretrain`?:? (report|rewind|demo|downstream|copy|prune|average|cooldown)\b"
)
DEFINED_IN = {
    "pyproject.toml",
    "data_prep/__main__.py",
    "slurm/__main__.py",
    "experiments/__main__.py",
    "tests/house/test_house.py",
}


def spelled_as_script(text: str) -> list[str]:
    """What a text calls by the name of a console script."""
    return [found.group() for found in SCRIPT.finditer(text)]


def test_commands_are_spelled_in_one_way():
    names = subprocess.run(
        ["git", "ls-files", "-z", "*.py", "*.md", "*.yaml", "*.yml", "*.sh", "*.toml", "Makefile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    checked = [name for name in names if name and name not in DEFINED_IN | {own_name()}]
    assert len(checked) > 200
    for name in checked:
        found = spelled_as_script((ROOT / name).read_text(encoding="utf-8"))
        assert not found, f"{name} calls `{found[0]}`; write `python -m PACKAGE COMMAND`"


def own_name() -> str:
    return Path(__file__).relative_to(ROOT).as_posix()


def options_of(parser: argparse.ArgumentParser):
    """Every argument of a parser and of its commands, with the words that lead there."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options_of(command)
        else:
            yield f"{parser.prog} {action.dest}", action.help


@pytest.mark.parametrize(
    "parser",
    [
        pretrain.cli._build_parser,
        slurm.cli._parser,
        experiments.cli._parser,
        xlstm_mcore.convert.cli._parser,
    ],
    ids=["pretrain", "slurm", "experiments", "convert"],
)
def test_every_option_has_a_help_text(parser):
    """A default alone is none."""
    for where, text in options_of(parser()):
        assert re.sub(r"\(default: .*?\)", "", text or "").strip(), where


def test_a_script_is_noticed_and_a_format_is_not():
    assert spelled_as_script("run `xlstm-data build` again")
    assert spelled_as_script("xlstm-pretrain launch run.yaml")
    assert not spelled_as_script('FORMAT = "xlstm-pretrain checkpoint"')
