"""`python -m pretrain generate`: prompts from files and stdin, what is printed and written."""

import contextlib
import io
import itertools
import json
import sys

import pytest

from pretrain import cli
from pretrain.checkpoint import TensorSlice, save_checkpoint
from tests.house.documents import fenced
from tests.xlstm_mcore.convert.small import train_tokenizer
from tests.xlstm_mcore.test_generation_state import make_model
from xlstm_io.tokenizer import read_tokenizer_files
from xlstm_mcore.parameters.slices import named_slices


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with the checkpoints of two steps, the first of which is the better one."""
    root = tmp_path_factory.mktemp("run")
    model = make_model("Mms*", vocab_size=512)
    parts = [
        TensorSlice(p.name, p.global_shape, p.global_offset, p.local(parameter.detach()))
        for _, parameter, slices in named_slices(model)
        for p in slices
    ]
    files = read_tokenizer_files(train_tokenizer(root / "t.model"))
    config = {"model": model.config.model.model_dump(mode="json")}
    for step, loss in ((10, 1.0), (20, 2.0)):
        state = {"valid_loss": loss, "valid_step": step, "tokenizer": {}}
        save_checkpoint(root, parts, state, config, step=step, files=files)
    return str(root)


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_file_of_prompts_becomes_a_file_of_completions(run, tmp_path, capsys):
    prompts = ["the quick", "", "def f(x):\n", "lazy dog"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps({'prompt': p, 'id': 7})}\n" for p in prompts))
    out = tmp_path / "out.jsonl"
    words = ["generate", run, "--prompts", str(file), "--num-samples", "2", "--max-tokens", "6"]
    assert cli.run([*words, "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    found = lines_of(out.read_text())
    assert [(one["prompt"], one["sample"]) for one in found] == [
        (prompt, sample) for prompt in prompts for sample in (0, 1)
    ]
    assert {one["ended_by"] for one in found} <= {"length", "end"}
    # A part of the file in another order, by their numbers, one at a time, to the screen.
    some = [{"prompt": prompts[n], "number": n} for n in (3, 1)]
    file.write_text("".join(f"{json.dumps(line)}\n\n" for line in some))
    assert cli.run([*words, "--batch", "1", "--json"]) == 0
    assert lines_of(capsys.readouterr().out) == [*found[6:8], *found[2:4]]


def test_prompts_come_from_stdin(run, monkeypatch, capsys):
    words = ["generate", run, "--max-tokens", "3", "--temperature", "0"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the quick\nbrown"))
    assert cli.run([*words, "--prompt", "-"]) == 0
    one = capsys.readouterr().out
    assert one.startswith('--- prompt "the quick\\nbrown"\nthe quick\nbrown')
    monkeypatch.setattr(sys, "stdin", io.StringIO('"the quick\\nbrown"\n{"prompt": "dog"}\n'))
    assert cli.run([*words, "--prompts", "-"]) == 0
    both = capsys.readouterr().out
    assert both.startswith(one) and '--- prompt "dog"' in both
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("pretrain.commands.after_run.generate.check_split", lambda path: None)
    assert cli.run([*words, "--prompts", "-"]) == 2
    assert "reaches one of several processes" in capsys.readouterr().err


def test_a_terminal_sees_the_text_as_it_comes(run, monkeypatch):
    shown = []

    class Terminal(io.StringIO):
        def isatty(self):
            return True

        def flush(self):
            shown.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Terminal())
    assert cli.run(["generate", run, "--prompt", "the quick", "--max-tokens", "12"]) == 0
    assert shown[0] == "the quick" and len(shown) > 5
    assert all(later.startswith(before) for before, later in itertools.pairwise(shown))
    shown.clear()
    assert cli.run(["generate", run, "--prompt", "the\x1b[2J", "--max-tokens", "1"]) == 0
    assert shown[-1].count("the\\x1b[2J") == 1, "a terminal obeys nothing that a model writes"


def test_which_checkpoint_is_chosen(run, capsys):
    assert cli.run(["show", run, "--checkpoint", "best"]) == 0
    assert "/step-00000010-" in capsys.readouterr().out
    assert cli.run(["generate", run, "--checkpoint", "20", "--max-tokens", "1"]) == 0
    assert cli.run(["generate", run, "--checkpoint", "15", "--max-tokens", "1"]) == 2
    assert "steps: 10, 20" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no prompt"),
        ('{"prompt": "a"}\nb\n', "line 2: not JSON"),
        ('{"text": "a"}\n', 'line 1: wanted {"prompt": TEXT}'),
        ('{"prompt": ["a"]}\n', 'line 1: wanted {"prompt": TEXT}'),
        ('{"prompt": "a", "number": -1}\n', "number=-1 must be"),
        ("[" * 100_000, "line 1: not JSON"),
        (b"\xff", "is not UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_bad_prompts_are_one_message(text, words, run, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert cli.run(["generate", run, "--prompts", str(file)]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_other_mistakes(run, tmp_path, capsys):
    assert cli.run(["generate", run, "--batch", "0"]) == 2
    assert cli.run(["generate", run, "--prompt", "-", "--prompts", "-"]) == 2
    assert cli.run(["generate", run, "--out", str(tmp_path / "no/x.jsonl")]) == 2
    message = capsys.readouterr().err
    assert "--batch=0" in message and "read once" in message and "no such folder" in message


def test_the_python_program_of_the_documentation(run, tmp_path):
    (program,) = fenced("docs/generation.md", "python")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/first").symlink_to(run)
    output = io.StringIO()
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(output):
        exec(compile(program, "docs/generation.md", "exec"), {})
    shape, text = output.getvalue().split("\n", 1)
    assert shape.startswith("torch.Size([1, ") and shape.endswith("512])") and text
