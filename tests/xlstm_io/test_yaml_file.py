"""YAML files: what plain YAML would let through in silence is one message."""

import os

import pytest

from data_prep import cli as data_prep
from pretrain.config import load_config
from xlstm_io.errors import ConfigError, PrepError, UserError
from xlstm_io.foreign import yaml_file
from xlstm_io.foreign.untrusted import LIMITS
from xlstm_io.foreign.yaml_file import MOST_VALUES, YAMLTextError, parse_yaml, read_yaml


def read(path, error=ConfigError):
    return read_yaml(path, of="run file", example="run:", error=error)


def test_values_are_those_of_yaml():
    text = "a: 1\nb: [x, 2.5, null, true]\nc: {d: 3e-4}\n# a comment\n1: one\n"
    assert parse_yaml(text) == {"a": 1, "b": ["x", 2.5, None, True], "c": {"d": "3e-4"}, 1: "one"}
    assert parse_yaml("") is None and parse_yaml("word") == "word"


def test_anchors_and_merges_work():
    text = "base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}\nlist: [*base, *base]\n"
    assert parse_yaml(text)["other"] == {"a": 1, "b": 3}
    assert parse_yaml(text)["list"] == [{"a": 1, "b": 2}] * 2


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)
BAD = {
    "a key twice": ("a: 1\na: 2\n", "line 2: a is given twice"),
    "a key twice below": ("a:\n  b: 1\n  c: 2\n  b: 1\n", "line 4: b is given twice"),
    "a list as a key": ("? [a, b]\n: 1\n", "a key is a list or a mapping"),
    "an alias bomb": (BOMB, f"more than {MOST_VALUES:,} values"),
    "an alias of itself": ("a: &a [1, *a]\n", "line 1: an alias refers to what it is part of"),
    "deep nesting": ("[" * 5000 + "]" * 5000, "nested too deeply"),
    "cut short": ("a: [1, 2", "not valid YAML: line 1, column 9: expected ',' or ']'"),
    "a bracket left open": (
        "a: {b: 1\nc:\n  d: 2\n",
        "line 2, column 2: expected ',' or '}', but got ':' (while parsing a flow mapping that "
        "begins in line 1)",
    ),
    "a tab": (
        "a:\n\tb: 1\n",
        "line 2, column 1: found character '\\t' that cannot start any token; indent with blanks",
    ),
    "two documents": ("a: 1\n---\nb: 2\n", "not valid YAML"),
    "a tag of Python": ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    "an unknown alias": ("a: *b\n", "not valid YAML"),
    "a 13th month": ("a: 2026-13-01\n", "not valid YAML"),
    "a number too long": ("a: " + "1" * 5000 + "\n", "not valid YAML"),
    "a control character": ("a: \x07\n", "not valid YAML"),
}
bad = pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)


@bad
def test_a_bad_text_is_one_message(text, message):
    with pytest.raises(YAMLTextError) as caught:
        parse_yaml(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@bad
def test_every_command_that_reads_a_yaml_file_says_so(tmp_path, text, message, capsys):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert data_prep.main(["build", str(path)]) == 2
    said = capsys.readouterr().err
    assert message in said and str(path) in said and "Traceback" not in said


@pytest.mark.parametrize("error", [ConfigError, PrepError, UserError])
def test_files_that_cannot_be_used(tmp_path, error):
    path = tmp_path / "file.yaml"
    with pytest.raises(error, match="does not exist; give the path of a run file"):
        read(path, error)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(error, match="cannot be read as text"):
        read(path, error)
    path.write_text("- a\n")
    with pytest.raises(error, match="must hold keys and values; a run file has keys such as run:"):
        read(path, error)
    with pytest.raises(error, match="cannot be read as text"):
        read(tmp_path, error)
    os.truncate(path, LIMITS.yaml + 1)
    with pytest.raises(error, match="are not read"):
        read(path, error)


def test_a_file_under_the_limit_of_values_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(yaml_file, "MOST_VALUES", 4)
    assert parse_yaml("[1, 2, 3]") == [1, 2, 3]
    with pytest.raises(YAMLTextError, match="more than 4 values"):
        parse_yaml("[1, 2, 3, 4]")


def test_a_run_file_may_be_a_link(tmp_path):
    (tmp_path / "real.yaml").write_text("run: {steps: 3}\n")
    (tmp_path / "run.yaml").symlink_to("real.yaml")
    assert read(tmp_path / "run.yaml") == {"run": {"steps": 3}}
