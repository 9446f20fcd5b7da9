"""`run.on_event`: what the command gets, and that its failure is told and changes nothing."""

import json
import sys
from pathlib import Path

import pytest

from pretrain.supervision import events
from pretrain.watching.history import read_history
from tests.pretrain.run_files import config


def test_the_command_gets_one_object(tmp_path):
    out = tmp_path / "with space.json"
    command = f"{sys.executable} -c 'import sys; open(sys.argv[1], \"w\").write(sys.stdin.read())'"
    assert events.send(f"{command} '{out}'", "done", {"step": 7, "reason": ""}) is None
    assert out.read_text().endswith("}\n"), "so that a file of several has a line for each"
    body = json.loads(out.read_text())
    assert body.pop("time").endswith("+00:00")
    assert body == {"event": "done", "step": 7, "reason": ""}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("/no/such/program", "cannot be run"),
        ("'", "cannot be run"),
        ("false", "ended with exit code 1"),
        ("sleep 60", "was ended after 0 s"),
    ],
)
def test_what_goes_wrong_is_said(command, words, monkeypatch):
    monkeypatch.setattr(events, "LIMIT_S", 0.2)
    assert words in events.send(command, "stopped", {})


def test_the_end_of_a_life_stands_in_the_history_and_reaches_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save = f'{sys.executable} -c \'import sys; open("out", "w").write(sys.stdin.read())\''
    run = config(run__dir="run", run__on_event=save)
    (tmp_path / "run").mkdir()
    events.report(run, "stopped", "SIGTERM", 7, 2, Path("c"), None)
    body = json.loads((tmp_path / "out").read_text())
    assert body["checkpoint"] == str(tmp_path / "c") and body["run"] == str(tmp_path / "run")
    (line,) = read_history(tmp_path / "run")
    assert (line["event"], line["life"], line["step"]) == ("stopped", 2, 7)
    assert line["reason"] == "SIGTERM"


def test_a_history_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "run").write_text("")
    events.report(config(run__dir=str(tmp_path / "run")), "done", "", 7, 1, None, 2.5)
