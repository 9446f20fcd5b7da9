"""Every command that the documents show is run: here, by a test that is named here, or by CI."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/checkpoints.md")
DATA_PREP = "tests/data_prep/test_documented.py"
END_TO_END = "tests/pretrain/test_end_to_end.py"

# Commands that take minutes, or need a trained model: who runs them.
RUN_ELSEWHERE = {
    "make pretrain": (END_TO_END, '"pretrain", "STEPS=20"'),
    "make pretrain MODEL=classic": (END_TO_END, '"pretrain", "MODEL=classic"'),
    "python -m pretrain launch my.yaml --nproc 2": (END_TO_END, '"pretrain", "launch", f"'),
    "python -m pretrain train": (END_TO_END, '"-m", "pretrain", "train"'),
    **{
        f"python -m data_prep {command}": (DATA_PREP, "README.md")
        for command in (
            "tokenizer --input corpus/books 'corpus/web/*.jsonl.zst' --vocab-size 32000 --out tok",
            "build prep.yaml",
            "verify shards --full",
            "inspect shards --row 0",
            "repack shards --seq-len 8192",
            "merge shards",
        )
    },
    "python -m benchmarks.data_prep": (DATA_PREP, "benchmarks.data_prep"),
    "python -m pretrain self-test my.yaml --nproc 2": (END_TO_END, '"pretrain", "self-test", path'),
    "python -m benchmarks.checkpoint": (
        "tests/pretrain/test_checkpoint_benchmark.py",
        "from benchmarks import checkpoint",
    ),
    "python -m benchmarks.trainer_overhead": (
        "tests/pretrain/test_trainer_overhead.py",
        "trainer_overhead.main(",
    ),
    **{
        f"python -m benchmarks.{name}": (
            "tests/xlstm_mcore/test_benchmarks.py",
            f'run("benchmarks.{name}"',
        )
        for name in ("train_step_cpu", "parity")
    },
    "python -m benchmarks.kernel_resources": (
        "tests/kernels/triton/test_aot.py",
        '"-m", "benchmarks.kernel_resources"',
    ),
    "make setup": (".ci/run", "make --no-print-directory setup"),
    "make lint": (".ci/run", "make --no-print-directory lint"),
    "make test": (".ci/run", "make --no-print-directory test"),
    "make test-peers": (".ci/run", "make --no-print-directory test-peers"),
    "make test TESTS=tests/kernels": (".ci/run", 'TESTS="--dist-share'),
    "python -m benchmarks.loader": (
        "tests/pretrain/data/test_loader_benchmark.py",
        '"benchmarks.loader", *arguments',
    ),
    ".ci/run": (".ci/run", "make --no-print-directory test"),
}


def commands():
    """(document, command) for every line of a sh block and every command in inline code."""
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        for block in re.findall(r"```sh\n(.*?)```", text, flags=re.S):
            yield from ((name, line.strip()) for line in block.splitlines() if line.strip())
        prose = re.sub(r"```.*?```", "", text, flags=re.S)
        for code in re.findall(r"`([^`\n]+)`", prose):
            if re.match(r"(make [a-z]|python -m|\.ci/run$)", code):
                yield name, code


COMMANDS = sorted(set(commands()))


def test_the_documents_show_commands():
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=[f"{d}:{c}" for d, c in COMMANDS])
def test_command_is_run(document, command):
    if command in RUN_ELSEWHERE:
        path, evidence = RUN_ELSEWHERE[command]
        assert evidence in (ROOT / path).read_text(encoding="utf-8"), (
            f"{document} shows `{command}`, which {path} does not run any more"
        )
        return
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"], f"{document} shows `{command}`, which no test runs"
    words = [str(ROOT / "pretrain/configs/cpu_demo.yaml") if w == "my.yaml" else w for w in words]
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_named_test_exists():
    named = set()
    for name in DOCUMENTS:
        named |= set(re.findall(r"`(tests/[\w./]+)::(\w+)`", (ROOT / name).read_text("utf-8")))
    assert len(named) >= 14
    for path, test in sorted(named):
        assert f"def {test}(" in (ROOT / path).read_text("utf-8"), f"no {test} in {path}"


def test_links_to_files_lead_somewhere():
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / target).exists(), f"{name} links to {target}"
        for path in re.findall(
            r"`((?:tests|pretrain|xlstm_mcore|constraints|kernels)/[\w./]*)`", text
        ):
            assert (ROOT / path).exists(), f"{name} names {path}"
