"""`downstream` says what is wrong with its options before it loads anything."""

import pytest

from pretrain import cli
from pretrain.commands.after_run import downstream


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", " , "], "names no task"),
        (["--tasks", "a", "--limit", "0"], "--limit=0 must be at least 1"),
        (["--tasks", "a", "--fewshot", "-1"], "--fewshot=-1 must be at least 0"),
        (["--tasks", "a", "--batch", "0"], "--batch=0 must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(words, message, capsys):
    assert cli.run(["downstream", "run", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_harness_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.setattr(downstream, "find_spec", lambda name: None)
    assert cli.run(["downstream", "run", "--tasks", "a"]) == 2
    assert "pip install 'xlstm-pretrain[eval]'" in capsys.readouterr().err
