"""Corpora over http: the same shards as from disk, and answers that are not what they should be."""

import gzip
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.sources.files import expand_inputs, file_fingerprint
from data_prep.sources.readers import read_documents
from tests.data_prep.small_corpus import run, tree_bytes, write_jsonl
from tests.http_server import serve
from xlstm_io.errors import PrepError


def texts_of(path):
    return [item.text for item in read_documents(path)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_over_http_equals_the_local_one(tmp_path, corpus, build_flags, shards, workers):
    with serve(corpus.parent) as (url, _):
        out = tmp_path / "out"
        flags = [*build_flags, "--workers", workers, "--out", out]
        assert run("build", *flags, "--input", f"{url}/*.jsonl") == 0
        assert tree_bytes(out) == tree_bytes(shards)


def test_every_kind_of_file(tmp_path, texts):
    plain = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(plain))
    pq.write_table(pa.table({"text": texts}), tmp_path / "d.parquet", row_group_size=7)
    with serve(tmp_path) as (url, _):
        found = expand_inputs([url])
        assert found == [f"{url}/{p.name}" for p in sorted(tmp_path.iterdir())]
        for path in found:
            assert texts_of(path) == texts
    with serve(tmp_path, listing=False) as (url, _):
        assert texts_of(*expand_inputs([f"{url}/a.jsonl"])) == texts


def test_a_file_of_many_requests(tmp_path):
    """fsspec asks for 5 MB at a time."""
    texts = [f"{number} {'x' * 10_000}" for number in range(1100)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    with serve(tmp_path) as (url, server):
        assert texts_of(f"{url}/a.jsonl") == texts
        assert len(server.asked) >= 3
        server.torn = 1
        with pytest.raises(PrepError, match=r"a.jsonl: cannot be read \("):
            texts_of(f"{url}/a.jsonl")
    with serve(tmp_path, ranges=False) as (url, _), pytest.raises(PrepError, match="range req"):
        texts_of(f"{url}/a.jsonl")


def test_a_changed_file_of_the_same_size_is_noticed(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    with serve(tmp_path) as (url, _):
        fingerprints = []
        for seconds in (10**9, 10**9 + 100):
            os.utime(file, (seconds, seconds))
            fingerprints.append(file_fingerprint(f"{url}/a.txt"))
        assert fingerprints[0] != fingerprints[1]


def test_credentials_of_urls_reach_no_file_and_no_message(
    tmp_path, corpus, build_flags, shards, capfd
):
    """They may change between jobs, and before the jobs are joined."""
    out = tmp_path / "out"
    flags = [*build_flags, "--workers", 1, "--out", out]
    bad = tmp_path / "served" / "b.jsonl"
    bad.parent.mkdir()
    bad.write_text('{"text": 3}\n')
    (bad.parent / corpus.name).write_bytes(corpus.read_bytes())
    with serve(bad.parent) as (url, _):
        for job, secret in enumerate(["hunter2", "hunter3"]):
            names = [f"{url}/{name}?token={secret}" for name in (corpus.name, bad.name)]
            inputs = [*flags, "--input", *names]
            assert run("build", *inputs, "--max-bad-share", 1, "--task", job, "--tasks", 2) == 0
        assert run("merge", out) == 0
        assert run("build", *inputs, "--max-bad-share", 1) == 0
        assert "nothing to do" in capfd.readouterr().out.splitlines()[-1]
        assert run("build", *flags, "--input", f"{url}/none.jsonl?token=hunter4") == 2
    printed = capfd.readouterr()
    files = [path for path in out.rglob("*") if path.is_file()]
    assert all(b"hunter" not in path.read_bytes() for path in files)
    assert "hunter" not in printed.out + printed.err and "token=***" in printed.err
    log = (out / "_work" / "malformed.log").read_text()
    assert "b.jsonl?token=*** no text" in log
