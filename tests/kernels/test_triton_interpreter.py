"""Runs the tests of tests/kernels/triton in a process of their own, under Triton's interpreter.

One process runs all modules, since its start costs as much as a small module. Each module is a test
case here, which passes if all tests of the module do.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((Path(__file__).parent / "triton").glob("test_*.py"))

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (pip install triton)", allow_module_level=True)


@pytest.fixture(scope="session")
def report(request, tmp_path_factory):
    """Test cases of every module that this session asks for, and the end of what was printed."""
    mine = [item for item in request.session.items if item.path == Path(__file__)]
    asked = {item.callspec.params["module"] for item in mine}
    results = tmp_path_factory.mktemp("interpreter") / "results.xml"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={results}"]
    process = subprocess.run(
        [*command, *(str(module) for module in MODULES if module in asked)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    cases = list(ElementTree.parse(results).iter("testcase")) if results.exists() else []
    return cases, f"{process.stdout[-4000:]}\n{process.stderr[-4000:]}"


def of_module(case: ElementTree.Element, module: Path) -> bool:
    """Whether a test case belongs to `module`; one that names no module does not."""
    name = ".".join(module.relative_to(ROOT).with_suffix("").parts)
    return case.get("classname") == name or case.get("name") == name  # the latter: not imported


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_module_under_the_interpreter(module, report):
    cases, printed = report
    mine = [case for case in cases if of_module(case, module)]
    assert mine, f"no test of {module.name} was run\n{printed}"
    faults = [
        f"{case.get('name')}\n{fault.text}"
        for case in mine
        for fault in case
        if fault.tag in ("failure", "error")
    ]
    assert not faults, "\n\n".join(faults)[:20000]
