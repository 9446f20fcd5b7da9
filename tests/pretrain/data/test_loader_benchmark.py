"""`python -m benchmarks.loader` at a tiny size: it runs and its figures mean what they say."""

import sys

import pytest

from benchmarks.loader import __main__ as loader
from benchmarks.loader import start as loader_start


@pytest.fixture
def folder(tmp_path):
    sizes = {"web": [64] * 5, "code": [64] * 3}
    loader.write_shards(tmp_path, sizes, seq_len=16)
    return tmp_path


def test_files_are_counted_and_bounded(folder):
    assert loader.opened_files(loader.make_plan(folder, 16), 512) == (8, 8)
    opened, most = loader.opened_files(loader.make_plan(folder, 16, "window", 1), 512)
    assert most <= 4 and 8 <= opened <= 12


def test_the_command_prints_speed_and_resume(monkeypatch, capsys):
    arguments = ["--rows", "128", "--seq-len", "16", "--rounds", "1", "--quick"]
    monkeypatch.setattr(sys, "argv", ["benchmarks.loader", *arguments])
    loader.main()
    out = capsys.readouterr().out
    assert "128 rows of 16" in out and "with 2 worker processes" in out and "1e+13:" in out


def test_the_start_over_many_shards_is_measured(monkeypatch, capsys):
    arguments = ["--shards", "20", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmarks.loader.start", *arguments])
    loader_start.main()
    out = capsys.readouterr().out
    assert "20 shards" in out and "first batch" in out
