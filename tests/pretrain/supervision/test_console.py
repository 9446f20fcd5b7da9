"""What rank 0 prints is kept, without the strokes of a progress bar."""

import io
import sys

import pytest

from pretrain.supervision.console import ConsoleLog
from pretrain.watching.metrics import MetricLogger
from xlstm_io.errors import MachineFailed, UserError


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_go_to_the_terminal_and_to_the_file(tmp_path, capsys):
    before = sys.stdout, sys.stderr
    with ConsoleLog(tmp_path / "logs" / "rank_0.log"):
        print("one")
        print("two", file=sys.stderr)
        sys.stderr.write("th")
        assert (tmp_path / "logs" / "rank_0.log").read_text() == "one\ntwo\n", "at once"
        sys.stderr.write("ree\n")
    assert (sys.stdout, sys.stderr) == before
    assert (tmp_path / "logs" / "rank_0.log").read_text() == "one\ntwo\nthree\n"
    out, err = capsys.readouterr()
    assert (out, err) == ("one\n", "two\nthree\n")


def test_a_bar_stays_a_bar_and_leaves_its_messages(tmp_path, monkeypatch):
    log, terminal = tmp_path / "rank_0.log", Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ConsoleLog(log), MetricLogger(tmp_path, total_steps=3) as metrics:
        metrics.message("the first line")
        for step in (1, 2, 3):
            metrics.log(step, {"loss": 2.0})
        metrics.log(3, {"valid_loss": 1.5})
        metrics.message("saved it")
    assert "\r" in terminal.getvalue() and "3/3" in terminal.getvalue()
    first, *middle, last = log.read_text().splitlines()
    assert first == "the first line" and "3/3" in last
    assert middle == ["step 3: valid_loss 1.500", "saved it"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UserError("bad key"), "error: bad key\n"),
        (MachineFailed("rank 0: disk"), "error: rank 0: disk\n"),
        (KeyboardInterrupt(), ""),
    ],
)
def test_the_error_that_ends_the_run_is_in_the_file(tmp_path, error, text):
    with pytest.raises(type(error)), ConsoleLog(tmp_path / "log"):
        raise error
    assert (tmp_path / "log").read_text() == text


def test_a_bug_keeps_its_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError), ConsoleLog(tmp_path / "log"):
        raise ZeroDivisionError("division by zero")
    text = (tmp_path / "log").read_text()
    assert text.startswith("Traceback") and text.endswith("ZeroDivisionError: division by zero\n")


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with ConsoleLog(tmp_path / "file" / "log"):
        print("hello")
    assert capsys.readouterr().out == "hello\n"
