"""One tiny run for all tests of documents and examples: the tutorial's, in its own words."""

import contextlib
import io
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.data_prep.small_corpus import make_texts
from tests.house.documents import fenced, shell_lines

TUTORIAL = "docs/tutorial.md"
# What a small corpus and a few seconds ask for, in the run file and in commands.
SMALLER = {
    "steps: 500": "steps: 4",
    "hidden_size: 256": "hidden_size: 32",
    "pattern: MMMM ": "pattern: MM ",
    "vocab_size: 8192": "vocab_size: 400",
    "seq_len: 512": "seq_len: 64",
    "global_batch: 16": "global_batch: 4",
    "micro_batch: 8": "micro_batch: 2",
    "warmup_steps: 20": "warmup_steps: 2",
    "max_batches: 10": "max_batches: 1",
    "--vocab-size 8192": "--vocab-size 400",
    "--seq-len 512": "--seq-len 64",
}


def smaller(text):
    """A run file or a command at the test's size."""
    for shown, small in SMALLER.items():
        text = text.replace(shown, small)
    return text


def run_here(command):
    """Exit code and output of a `python -m ...` command, in this process."""
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"], command
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        match words[2]:
            case "data_prep":
                from data_prep.cli import main

                code = main(words[3:])
            case "pretrain":
                from pretrain.cli import run

                code = run(words[3:])
            case "xlstm_mcore.convert":
                from xlstm_mcore.convert.cli import main

                code = main(words[3:])
    return code, output.getvalue()


@dataclass
class TutorialRun:
    """The folder in which the tutorial was followed, and what its commands printed."""

    folder: Path
    outputs: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="session")
def tutorial(tmp_path_factory):
    """All commands of docs/tutorial.md, in their order, on a small corpus."""
    done = TutorialRun(tmp_path_factory.mktemp("tutorial"))
    texts = done.folder / "texts"
    texts.mkdir()
    for number, text in enumerate(make_texts(200)):
        (texts / f"{number}.txt").write_text(text)
    (run_file,) = fenced(TUTORIAL, "yaml")
    (done.folder / "run.yaml").write_text(smaller(run_file))
    with contextlib.chdir(done.folder):
        for command in shell_lines(TUTORIAL):
            code, done.outputs[command] = run_here(smaller(command))
            assert code == 0, f"{command}: exit code {code}\n{done.outputs[command]}"
    return done
