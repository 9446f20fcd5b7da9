"""metrics.jsonl, TensorBoard events, and progress."""

import errno
import io
import json
import os
import shutil

import pytest

from pretrain.watching import progress
from pretrain.watching.metrics import MetricLogger, read_metrics
from pretrain.watching.progress import describe, duration
from xlstm_io.errors import ConfigError


def run(folder, first, last, loss=1.0, **keys):
    stream = io.StringIO()
    with MetricLogger(folder, total_steps=10, start_step=first, stream=stream, **keys) as metrics:
        for step in range(first + 1, last + 1):
            metrics.advance(step)
            metrics.log(step, {"tokens": step * 4, "loss": loss, "lr": 1e-3})
    return stream.getvalue()


def test_lines_are_flushed_json_with_each_step_once(tmp_path):
    with MetricLogger(tmp_path / "run", total_steps=3, stream=io.StringIO()) as metrics:
        metrics.log(1, {"loss": 2.0})
        metrics.log(2, {"loss": 1.5, "grad_norm": float("nan")})
        metrics.log(2, {"valid_loss": 1.7})
        written = (tmp_path / "run" / "metrics.jsonl").read_text()  # before it is closed
        metrics.log(3, {"loss": 1.0})
    assert [json.loads(line) for line in written.splitlines()] == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.5, "grad_norm": None, "valid_loss": 1.7},
    ]
    steps = [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [1, 2, 3]


def test_resuming_drops_what_lies_beyond(tmp_path):
    run(tmp_path, 0, 6, loss=5.0)
    run(tmp_path, 4, 7, loss=3.0)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in records] == [
        (1, 5.0),
        (2, 5.0),
        (3, 5.0),
        (4, 5.0),
        (5, 3.0),
        (6, 3.0),
        (7, 3.0),
    ]


def test_an_evaluation_that_a_later_life_makes_adds_to_the_record_of_its_step(tmp_path):
    run(tmp_path, 0, 4)
    with MetricLogger(tmp_path, total_steps=10, start_step=4, stream=io.StringIO()) as metrics:
        metrics.log(4, {"valid_loss": 2.5})
        metrics.log(5, {"loss": 1.0})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    assert records[3] == {"step": 4, "tokens": 16, "loss": 1.0, "lr": 1e-3, "valid_loss": 2.5}


def test_a_torn_last_line_is_forgotten(tmp_path):
    run(tmp_path, 0, 3)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    run(tmp_path, 3, 4)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "line",
    [
        b"\x80\xff\n",
        b'{"step": 2, "loss": \xc3\x28}\n',
        b"a note of mine\n",
        b"[" * 100_000 + b"\n",
        b"[1, 2]\n",
        b"{}\n",
        b'{"step": "2"}\n',
        b'{"step": true}\n',
        b"\n",
    ],
)
def test_a_damaged_or_foreign_line_is_left_out_and_the_rest_kept(line, tmp_path):
    run(tmp_path, 0, 4)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:1], line, *lines[1:]]))
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]
    run(tmp_path, 4, 5)
    assert path.read_bytes().splitlines(keepends=True)[:4] == lines


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "broken link"])
def test_something_else_in_the_place_of_the_log_is_one_message(kind, tmp_path):
    path = tmp_path / "metrics.jsonl"
    {
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/full"),
        "broken link": lambda: path.symlink_to("nowhere"),
    }[kind]()
    with pytest.raises(ConfigError, match=r"metrics.jsonl is not a file"):
        run(tmp_path, 0, 1)


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_log_that_nobody_would_find_is_noticed_at_the_next_record(how, tmp_path):
    stream = io.StringIO()
    with MetricLogger(tmp_path / "run", total_steps=3, stream=stream) as metrics:
        metrics.log(1, {"loss": 2.0})
        shutil.rmtree(tmp_path / "run")
        if how == "replaced":
            run(tmp_path / "run", 0, 1)
        metrics.log(2, {"loss": 2.0})
        metrics.log(3, {"loss": 2.0})
    assert "removed or replaced while the run was at work" in str(metrics.fault)
    assert stream.getvalue().count("the run saves and stops") == 1


def test_a_full_disk_is_remembered_and_ends_nothing(tmp_path):
    with MetricLogger(tmp_path, total_steps=3, stream=io.StringIO()) as metrics:
        metrics.log(1, {"loss": 2.0})
        os.dup2(os.open("/dev/full", os.O_WRONLY), metrics._file.fileno())
        metrics._is_there = lambda: True
        metrics.log(2, {"loss": 2.0})
    assert metrics.fault.errno == errno.ENOSPC  # and what is held back is not missed at the end
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_a_log_file_gets_plain_lines(tmp_path):
    text = run(tmp_path, 0, 2)
    assert text.count("\n") == 2
    assert "step 2/10  loss 1.000  lr 1.00e-03" in text
    assert "\r" not in text


def test_a_terminal_gets_a_bar(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with MetricLogger(tmp_path, total_steps=4, stream=stream) as metrics:
        for step in range(1, 5):
            metrics.advance(step)
        metrics.evaluating(2, 9)
        metrics.log(4, {"loss": 1.25, "valid_loss": 1.5})
        metrics.message("saved")
    assert "step 4/4" in stream.getvalue()
    assert "loss 1.250" in stream.getvalue()
    assert "saved\n" in stream.getvalue()
    assert "evaluating 2/9" in stream.getvalue()


def test_a_log_file_hears_of_a_long_evaluation_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "EVALUATION_LINE_S", 0.0)
    stream = io.StringIO()
    with MetricLogger(tmp_path, total_steps=4, stream=stream) as metrics:
        metrics.evaluating(0, 2000)
        metrics.evaluating(1500, 2000)
    assert stream.getvalue() == "evaluating: 1,500 of 2,000 batches\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_closed_terminal_does_not_end_the_run(tmp_path, terminal):
    class Gone(io.StringIO):
        def isatty(self):
            return terminal

        def write(self, text):
            raise OSError(5, "Input/output error")

    Gone.flush = lambda self: self.write("")
    with MetricLogger(tmp_path, total_steps=2, stream=Gone()) as metrics:
        metrics.advance(1)
        metrics.log(1, {"loss": 1.0, "valid_loss": 1.0})
        metrics.message("saved")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_other_ranks_write_nothing(tmp_path):
    text = run(tmp_path / "run", 0, 3, enabled=False)
    assert text == ""
    assert not (tmp_path / "run").exists()


def test_describe_is_short():
    text = describe({"step": 3, "tokens": 9, "loss": 4.0, "lr": 1e-3, "tokens_per_second": 2500.0})
    assert text == "loss 4.000  lr 1.00e-03  tokens/s 2,500"


def test_describe_says_what_is_left_and_what_is_short():
    values = {"step_seconds": 2.0, "data_wait_seconds": 0.5, "skipped": 3, "time": 1.7e9}
    text = describe(values | {"peak_memory_bytes": 3 * 2**30, "eta_seconds": 7500.0})
    assert text == "data wait 25%  skipped 3  memory 3.00 GiB  eta 2 h 05 min"
    assert describe(values | {"data_wait_seconds": 0.001, "skipped": 0}) == ""


@pytest.mark.parametrize(
    ("tflops", "text"), [(412.34, "tflops 412"), (1.0, "tflops 1"), (6.05e-5, "gflops 0.0605")]
)
def test_small_speeds_are_readable(tflops, text):
    assert describe({"tflops": tflops}) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (3599, "59 min 59 s"), (86399, "23 h 59 min"),
     (4 * 86400 + 3 * 3600, "4 d 03 h")],
)  # fmt: skip
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text
