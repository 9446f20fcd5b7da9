"""`run.on_event`: what the command gets, and that its failure is told and changes nothing."""

import json
import sys

import pytest

from pretrain.supervision import events


def test_the_command_gets_one_object(tmp_path):
    out = tmp_path / "with space.json"
    command = f"{sys.executable} -c 'import sys; open(sys.argv[1], \"w\").write(sys.stdin.read())'"
    assert events.send(f"{command} '{out}'", "done", {"step": 7, "reason": ""}) is None
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
