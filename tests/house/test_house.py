"""The house rules, kept by a machine: who may import whom, what lies where, what is documented."""

import ast
import importlib
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "xlstm_io": ROOT / "xlstm_io",
    "xlstm_kernels": ROOT / "kernels" / "xlstm_kernels",
    "xlstm_mcore": ROOT / "xlstm_mcore",
    "pretrain": ROOT / "pretrain",
    "slurm": ROOT / "slurm",
    "data_prep": ROOT / "data_prep",
    "experiments": ROOT / "experiments",
}
ALLOWED = {
    "xlstm_io": set(),
    "xlstm_kernels": set(),
    "xlstm_mcore": {"xlstm_io", "xlstm_kernels"},
    "pretrain": {"xlstm_io", "xlstm_kernels", "xlstm_mcore"},
    "slurm": {"xlstm_io", "xlstm_kernels", "xlstm_mcore", "pretrain"},
    "data_prep": {"xlstm_io"},
    "experiments": {"xlstm_io", "xlstm_kernels", "xlstm_mcore", "pretrain", "slurm", "data_prep"},
}
PEERS = {"xlstm", "mlstm_kernels", "flashrnn", "fla"}
# It travels with exports as one file.
LONG_FILES = {"xlstm_mcore/hf/modeling_xlstm_blocks.py": 950}
# Where the word may stand: what makes megatron-core run without it, and what asks for the device.
CUDA_FILES = {
    "kernels/xlstm_kernels/common/launch_graph.py",  # captures what it is given
    "xlstm_mcore/hardware.py",
    "xlstm_mcore/megatron/cpu_runtime.py",
    "xlstm_mcore/megatron/compat.py",
    "pretrain/layout.py",
    "pretrain/processes/devices.py",
    "slurm/job/decide.py",  # recognises what the driver and NCCL say
}

SOURCES = [
    pytest.param(package, path, id=str(path.relative_to(ROOT)))
    for package, folder in FOLDERS.items()
    for path in sorted(folder.rglob("*.py"))
]


def imported(path):
    """Modules that a file imports, in full."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level


@pytest.mark.parametrize(("package", "path"), SOURCES)
def test_imports_go_one_way(package, path):
    for module in imported(path):
        top = module.split(".")[0]
        assert top not in PEERS, f"{path} imports {module}: peers are test references only"
        assert module != "kernels" and not module.startswith("kernels.")
        if top in FOLDERS and top != package:
            assert top in ALLOWED[package], f"{package} must not import {module}"


def test_architecture_names_every_room_and_no_other():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    block = re.search(r"## The house.*?```\n(.*?)```", text, flags=re.S).group(1)
    named = [line.split()[0] for line in block.splitlines()]
    assert len(named) == len(set(named))
    for room in named:
        assert (ROOT / room).is_dir(), f"ARCHITECTURE.md names {room}, which is not there"
    holding_code = {path.parent for folder in FOLDERS.values() for path in folder.rglob("*.py")}
    rooms = {f"{folder.relative_to(ROOT)}/" for folder in holding_code}
    assert rooms <= set(named), f"ARCHITECTURE.md does not name {sorted(rooms - set(named))}"


@pytest.mark.parametrize(("package", "path"), SOURCES)
def test_the_device_is_asked_for_in_one_place(package, path):
    if str(path.relative_to(ROOT)) in CUDA_FILES:
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert "cuda" not in line.lower(), f"{path}:{number}: ask the layout for its device"


@pytest.mark.parametrize(("package", "path"), SOURCES)
def test_files_have_one_purpose_and_say_it(package, path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert (ast.get_docstring(tree) or "").strip(), f"{path} has no module docstring"
    lines = len(path.read_text(encoding="utf-8").splitlines())
    limit = LONG_FILES.get(str(path.relative_to(ROOT)), 400)
    assert lines <= limit, f"{path} has {lines} lines: has it more than one purpose?"


def test_a_loop_of_links_raises_nowhere():
    """`Path.resolve` raises RuntimeError for one before Python 3.13, `storage.absolute` never."""
    for source in SOURCES:
        _, path = source.values
        for line in path.read_text(encoding="utf-8").splitlines():
            assert ".resolve()" not in line or "__file__" in line, f"{path}: {line.strip()}"


def test_kernels_is_no_package():
    """A top-level ``kernels`` package would shadow Hugging Face's of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"]["find"]["where"] == [".", "kernels"]


def test_transformers_finds_its_own_kernels_package(tmp_path):
    """From the repository's root ``import kernels`` must find Hugging Face's package, not ours."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("class CUDAProperties: ...\nOURS = False\n")
    script = textwrap.dedent("""
        import sys
        sys.path.append(sys.argv[1])
        import kernels
        assert kernels.OURS is False, kernels
        from transformers import xLSTMForCausalLM
    """)
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=True, timeout=120)


def test_peers_are_listed_for_tests_only():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted += extra
    names = {re.split(r"[^A-Za-z0-9_.-]", line)[0].lower().replace("-", "_") for line in wanted}
    assert not names & {"xlstm", "mlstm_kernels", "flashrnn"}
    peers = (ROOT / "tests" / "peers.txt").read_text()
    assert "xlstm==" in peers and "NXAI Community License" in peers


def test_the_product_is_clean_for_ruff():
    """Style, unused code and a docstring on every public module, class and function."""
    for arguments in (["check"], ["format", "--check"]):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "."],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stdout + result.stderr


def test_no_machine_of_ours_is_named():
    """Paths of one machine or hosts of package registries have no place in the tree."""
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\0")
    pattern = re.compile(r"py[p]i\.org|files\.pythonh[o]sted|/home/[a-z]+/|/r[o]ot/")
    for name in files:
        path = ROOT / name
        if not name or not path.is_file() or path.suffix in {".png"}:
            continue
        found = pattern.search(path.read_text(encoding="utf-8", errors="ignore"))
        assert not found, f"{name}: {found.group()}"


def test_console_scripts_exist():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    names = ("data", "pretrain", "convert", "slurm", "experiments")
    assert set(scripts) == {f"xlstm-{name}" for name in names}
    for target in scripts.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function)), target
