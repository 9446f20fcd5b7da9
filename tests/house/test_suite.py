"""What the suite itself promises: no GPU but in tests/gpu, and a table of where its time went."""

import os
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.conftest import only_gpu_tests
from tests.minutes_per_folder import table

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"])
def test_gpus_are_hidden_here_and_in_children(name):
    assert os.environ[name] == ""
    script = f"import os; print(repr(os.environ[{name!r}]))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "''"


@pytest.mark.parametrize(
    ("arguments", "visible"),
    [
        (["tests/gpu"], True),
        (["tests/gpu/test_gpu_kernels.py::test_carried_state"], True),
        (["tests"], False),
        (["tests/gpu", "tests/dist"], False),
        ([], False),
    ],
)
def test_tests_of_the_gpu_see_it_when_they_run_alone(arguments, visible):
    assert only_gpu_tests(arguments, ROOT) == visible


def test_no_folder_of_tests_is_passed_over(pytestconfig):
    """pytest's own list of folders that it does not enter has one called `dist`."""
    patterns = pytestconfig.getini("norecursedirs")
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    parts = {part for folder in folders for part in folder.relative_to(ROOT).parts}
    assert {"dist", "kernels"} <= parts
    assert not [part for part in parts for pattern in patterns if fnmatch(part, pattern)]


def test_the_budget_table_has_a_line_per_folder_and_the_rest():
    lines = table(Counter({"tests/dist": 120.0, "tests/gpu": 60.0}), total=600.0)
    assert [line.split() for line in lines[:2]] == [
        ["tests/dist", "2.0"],
        ["tests/gpu", "1.0", "(3)"],
    ]
    assert lines[2].split()[-2:] == ["9.0", "(18)"]
    assert lines[3].split() == ["everything", "10.0", "(41)"]
