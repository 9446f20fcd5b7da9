"""docs/tutorial.md: what its commands leave and print, on a small corpus."""

import contextlib
import io

from pretrain.watching.metrics import read_metrics
from tests.house.conftest import SMALLER, TUTORIAL
from tests.house.documents import fenced, read


def output_of(tutorial, words):
    (output,) = (text for command, text in tutorial.outputs.items() if words in command)
    return output


def test_the_page_has_what_the_test_makes_smaller():
    assert [shown for shown in SMALLER if shown not in read(TUTORIAL)] == []


def test_the_run_is_trained_to_its_end(tutorial):
    steps = [r["step"] for r in read_metrics(tutorial.folder / "runs/first/metrics.jsonl")]
    assert max(steps) == 4
    assert "finished, 4 of 4 steps" in output_of(tutorial, "pretrain report")
    assert "bigram, Kneser-Ney" in output_of(tutorial, "pretrain report")


def test_commands_on_the_run_say_what_the_page_promises(tutorial):
    assert "2 processes" in output_of(tutorial, "pretrain check") or "on 2" in output_of(
        tutorial, "pretrain check"
    )
    assert "nats per token" in output_of(tutorial, "pretrain evaluate")
    assert '--- prompt "Once upon a time"' in output_of(tutorial, "pretrain generate")
    assert "logits agree" in output_of(tutorial, "convert verify")


def test_transformers_continues_the_text(tutorial):
    (program,) = fenced(TUTORIAL, "python")
    output = io.StringIO()
    with contextlib.chdir(tutorial.folder), contextlib.redirect_stdout(output):
        exec(compile(program, TUTORIAL, "exec"), {})
    assert "Once upon a time" in output.getvalue()


def test_the_registered_class_loads_the_export(tutorial):
    (program,) = fenced("docs/huggingface.md", "python")
    names = {}
    with contextlib.chdir(tutorial.folder):
        exec(compile(program, "docs/huggingface.md", "exec"), names)
    assert names["model"].num_parameters() > 0
