"""The constraints files: one stack of pinned packages each, which pip can install as it stands."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "constraints").glob("*.txt"))
# What torch's CUDA wheels for Linux require. CPU wheels require none, so pip on a machine without a
# GPU does not notice a pin that no GPU machine can install.
TRITON_OF_TORCH = {"2.11.0": "3.6.0", "2.13.0": "3.7.1", "2.14.1": "3.8.0"}


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(file):
    lines = (line for line in file.read_text().splitlines() if not line.startswith("#"))
    return {name.lower(): version for name, version in (line.split("==") for line in lines)}


def name_of(file):
    return file.stem


def test_there_are_three_stacks():
    assert [file.name for file in FILES] == [
        "py311-mcore016.txt",
        "py312-mcore016-torch211.txt",
        "py312-mcore019.txt",
    ]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_base_dependencies_are_pinned(file):
    extras = project()["optional-dependencies"]
    wanted = [*project()["dependencies"], *extras["dev"], *extras["cpu"], *extras["gpu"]]
    names = {re.split(r"[^A-Za-z0-9_.-]", line)[0].lower() for line in wanted}
    assert not names - {project()["name"]} - pins(file).keys()


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_triton_is_the_one_that_torch_requires(file):
    assert pins(file)["triton"] == TRITON_OF_TORCH[pins(file)["torch"]]


def test_the_oldest_pinned_torch_and_megatron_core_are_the_lower_bounds():
    def key(version):
        return [int(part) for part in version.split(".")]

    for package, digits in (("torch", 2), ("megatron-core", 3)):
        oldest = min((pins(file)[package] for file in FILES), key=key)
        (bound,) = (d for d in project()["dependencies"] if d.startswith(f"{package}>="))
        assert bound == f"{package}>={'.'.join(oldest.split('.')[:digits])}"
