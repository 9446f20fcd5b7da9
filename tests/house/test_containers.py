"""The container files say what the constraints say. They are built by hand, where a builder is."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "containers" / "Dockerfile").read_text(encoding="utf-8")
APPTAINER = (ROOT / "containers" / "apptainer.def").read_text(encoding="utf-8")
BOTH = pytest.mark.parametrize("text", [DOCKERFILE, APPTAINER], ids=["docker", "apptainer"])
INSTRUCTIONS = {"FROM", "RUN", "WORKDIR", "COPY", "ARG", "CMD"}


@BOTH
def test_constraints_are_there_and_for_that_python(text):
    files = re.findall(r"constraints/[\w.-]+\.txt", text)
    major, minor = re.search(r"python:(\d)\.(\d+)-", text).groups()
    assert files
    for name in files:
        assert (ROOT / name).is_file(), name
        assert Path(name).name.startswith(f"py{major}{minor}-")


@BOTH
def test_a_compiler_for_triton_is_installed_and_lists_are_not_kept(text):
    assert re.search(r"apt-get install .*\bgcc\b", text)
    assert "rm -rf /var/lib/apt/lists/*" in text and "--no-cache-dir" in text


def test_every_line_of_the_dockerfile_is_an_instruction():
    whole = re.sub(r"\\\n", " ", DOCKERFILE)
    lines = [line for line in whole.splitlines() if line and not line.startswith("#")]
    assert {line.split()[0] for line in lines} <= INSTRUCTIONS
    assert lines[0].startswith("FROM ") and "latest" not in lines[0]


def test_sections_of_the_apptainer_definition_are_its_own():
    assert re.findall(r"^%(\w+)", APPTAINER, re.M) == ["files", "post", "runscript"]
    assert APPTAINER.split("\n\n")[0].splitlines()[-2:] == [
        "Bootstrap: docker",
        "From: python:3.12-slim-bookworm",
    ]
