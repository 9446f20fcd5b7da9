"""Wrong options of a command: one line with value, rule and remedy."""

import contextlib
import io
import sys

import pytest

from data_prep.cli import _NAMES, main


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("tokenizer", "tokenizer: --out is missing; `python -m data_prep tokenizer --help` lists"),
        ("build", "build: --tokenizer and --out are missing; "),
        ("merge", "merge: PATH is missing; "),
        ("import-megatron --tokenizer x --out y", "import-megatron: give the path of a corpus"),
        ("tokenizer --out x --inptu y", "there is no option --inptu; did you mean --input?; "),
        ("tokenizer --out x --vocab-size abc", "--vocab-size 'abc': not a whole number; "),
        ("tokenizer --out x --sample-mb abc", "--sample-mb 'abc': not a number; "),
        ("inspect x --split foo", "--split 'foo': must be one of 'train', 'valid'; "),
        ("tokenizer --out x --from-hf no/gpt2", "there is no file or folder no/gpt2; a model of"),
        ("build --out x --tokenizer y --seq-len 1 --input z", "seq_len=1 must be greater than or"),
    ],
)
def test_one_line_says_what_is_wrong(words, says, capfd):
    assert main(words.split()) == 2
    out, error = capfd.readouterr()
    assert out == "" and error.count("\n") == 1 and says in error, error
    assert not set("│╭╰─") & set(error)


def test_a_terminal_without_utf_8_gets_the_same_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["build"]) == 2
    assert "build: --tokenizer and --out are missing; " in capsys.readouterr().err


def test_keys_of_a_file_are_named_without_their_control_characters(tmp_path, capfd):
    path = tmp_path / "prep.yaml"
    path.write_text('"a\\e[31m\\nb": 1\nsources: [{name: x, input: 7}]\nseq_len: [1]\n')
    assert main(["build", str(path)]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "\x1b" not in error
    assert "a\\x1b[31m\\nb is not a setting" in error
    assert "sources[0].input=7 must be a list, such as [a, b]" in error
    assert "seq_len=[1] must be a whole number" in error


@pytest.mark.parametrize("command", [*_NAMES, "synthetic parity"])
def test_help_says_none_where_a_default_is_empty(command, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    said = capfd.readouterr().out
    assert "(default: )" not in " ".join(said.split()) and "usage" in said
    if command == "build":
        assert "(default: none)" in said and "(default: 256)" in said


def test_help_is_printed_as_before(capfd):
    with pytest.raises(SystemExit) as end:
        main(["verify", "--help"])
    assert end.value.code == 0 and "--full" in capfd.readouterr().out
