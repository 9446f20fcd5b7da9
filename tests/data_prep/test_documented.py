"""The walk through data preparation that docs/data.md shows, and the benchmark at a tiny size."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import zstandard

from tests.data_prep.small_corpus import make_texts, run, tree_bytes, write_jsonl
from xlstm_io.shards.manifest import load_manifest

ROOT = Path(__file__).parents[2]


def test_documented_commands_in_order(tmp_path, monkeypatch):
    text = (ROOT / "docs/data.md").read_text()
    section = text.split("## Preparing data")[1].split("\n## ")[0]
    (config,) = re.findall(r"``yaml\n(.*?)``", section, flags=re.S)
    (block,) = re.findall(r"``sh\n(.*?)``", section, flags=re.S)
    commands = [shlex.split(line) for line in block.splitlines()]
    monkeypatch.chdir(tmp_path)
    for name in ("books", "web"):
        (tmp_path / "corpus" / name).mkdir(parents=True)
    plain = write_jsonl(tmp_path / "plain.jsonl", make_texts(300))
    packed = zstandard.compress(plain.read_bytes())
    (tmp_path / "corpus/web/a.jsonl.zst").write_bytes(packed)
    paragraphs = [f"Chapter {n}, of which more later." for n in range(300)]
    (tmp_path / "corpus/books/b.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "prep.yaml").write_text(config + "valid_fraction: 0.1\n")
    for words in commands:
        assert words[:3] == ["python", "-m", "data_prep"]
        assert run(*("400" if word == "32000" else word for word in words[3:])) == 0, words
    sources = load_manifest("shards").sources
    assert [source.name for source in sources] == ["web", "books"]
    assert load_manifest("shards-8192").seq_len == 8192
    for task in range(2):
        assert run("build", "prep.yaml", "--out", "by", "--task", task, "--tasks", 2) == 0
    assert run("merge", "by") == 0
    assert tree_bytes(tmp_path / "by") == tree_bytes(tmp_path / "shards")


def test_benchmark_runs(tmp_path):
    """`python -m benchmarks.data_prep` on a corpus of kilobytes; the peer's part where it is."""
    corpus = write_jsonl(tmp_path / "c.jsonl", make_texts(200))
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.data_prep", "--input", str(corpus)]
    command += ["--vocab-size", "400", "--rounds", "1", "--skip", "scaling", "memory"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "documents have identical ids" in done.stdout and "best_fit" in done.stdout
