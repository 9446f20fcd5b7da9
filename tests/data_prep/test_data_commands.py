import json
import subprocess
import sys

import pytest

from data_prep.jobs import progress
from data_prep.sources.readers import read_documents
from data_prep.tools import collect as collect_module
from data_prep.tools.collect import library_files
from tests.data_prep.small_corpus import run, write_jsonl
from xlstm_io.shards.manifest import load_manifest


def test_collect_files_is_deterministic_and_a_no_op(tmp_path, corpus, texts, capsys):
    for name in ("a", "b"):
        assert run("collect", "--input", corpus, "--min-mb", 0, "--out", tmp_path / name) == 0
    first = tmp_path / "a/corpus.jsonl.zst"
    assert first.read_bytes() == (tmp_path / "b/corpus.jsonl.zst").read_bytes()
    assert [item.text for item in read_documents(first)] == texts
    stamp = first.stat().st_mtime_ns
    capsys.readouterr()
    assert run("collect", "--input", corpus, "--min-mb", 0, "--out", tmp_path / "a") == 0
    assert first.stat().st_mtime_ns == stamp and "nothing to do" in capsys.readouterr().out
    note = json.loads((tmp_path / "a/SOURCE.json").read_text())
    assert note["documents"] == len(texts) and note["licence"]


def test_collect_refuses_too_little_and_other_inputs(tmp_path, corpus, capsys):
    out = tmp_path / "c"
    assert run("collect", "--input", corpus, "--out", out) == 2
    error = capsys.readouterr().err
    assert "--min-mb asks for 8" in error and error.count("\n") == 1
    assert not list(out.glob("*"))
    assert run("collect", "--input", corpus, "--min-mb", 0, "--out", out) == 0
    before = (out / "corpus.jsonl.zst").read_bytes()
    other = write_jsonl(tmp_path / "other.jsonl", ["something else"])
    assert run("collect", "--input", other, "--min-mb", 0, "--out", out) == 2
    assert (out / "corpus.jsonl.zst").read_bytes() == before


def test_library_files_leave_out_tests_and_packages(tmp_path):
    wanted = ["a.py", "b/c.py"]
    unwanted = ["test/x.py", "b/tests/y.py", "site-packages/p.py", "_sysconfigdata_z.py", "n.txt"]
    for name in wanted + unwanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = [path.relative_to(tmp_path).as_posix() for path in library_files(tmp_path)]
    assert names == wanted


def test_verify_light_and_full(shards, capsys):
    assert run("verify", shards) == 0 and run("verify", shards, "--full") == 0
    assert capsys.readouterr().out.count("no problem") == 2


def test_inspect_marks_documents(shards, capsys):
    assert run("inspect", shards) == 0
    assert "330 pieces" in capsys.readouterr().out
    assert run("inspect", shards, "--row", 0) == 0
    assert "document starts\n# 0\n" in capsys.readouterr().out
    valid = sum(entry.rows for entry in load_manifest(shards).shards("valid"))
    for row in range(valid):
        assert run("inspect", shards, "--row", row, "--split", "valid") == 0
    rows = capsys.readouterr().out
    assert "continues from an earlier row" in rows and "padding" in rows
    assert run("inspect", shards, "--row", valid, "--split", "valid") == 2
    assert f"rows 0 to {valid - 1}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["verify", "inspect", "baselines"])
def test_no_shards_there(command, tmp_path, capsys):
    assert run(command, tmp_path / "nothing") == 2
    assert run(command, tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_usage(capsys):
    assert run() == 2
    assert run("--help") == 0
    assert run("frobnicate") == 2
    assert run("build", "--help") == 0
    out = capsys.readouterr().out
    assert "--seq-len" in out and "--valid-fraction" in out


def test_module_entry_point_returns_the_exit_code(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", "verify", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2 and "unfinished" in done.stderr and not done.stdout


@pytest.mark.parametrize("step", range(5))
def test_collect_killed_between_its_files_is_done_again(tmp_path, corpus, monkeypatch, step):
    """Whichever file is the last to appear, the same command then finishes."""
    calls = []

    def dying(real):
        def call(*arguments):
            calls.append(arguments)
            if len(calls) == step + 1:
                raise KeyboardInterrupt
            return real(*arguments)

        return call

    arguments = (tmp_path / "out", [str(corpus)])
    with monkeypatch.context() as patch:
        patch.setattr(collect_module, "write_atomic", dying(collect_module.write_atomic))
        patch.setattr(collect_module.os, "replace", dying(collect_module.os.replace))
        with pytest.raises(KeyboardInterrupt):
            collect_module.collect(*arguments, min_mb=0)
    path = collect_module.collect(*arguments, min_mb=0)
    assert len(list(read_documents(path))) == len(list(read_documents(corpus)))


def test_progress_of_text_that_was_compressed(monkeypatch, capsys):
    """The total is bytes as stored: past it there is no share and no time left to print."""
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0)
    bar = progress.Progress("scan", 1_000_000)
    bar.set(500_000)
    bar.set(3_000_000)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("scan: 50 % (0.5 MB") and "s left" in first
    assert second.startswith("scan: 3.0 MB") and "left" not in second and "%" not in second
