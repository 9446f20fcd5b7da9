"""A tiny folder of shards for the loaders, made once."""

from pathlib import Path

import pytest

from tests.data_prep.small_corpus import make_texts, run, write_jsonl

SEQ_LEN = 16


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("loader")
    corpus = write_jsonl(root / "corpus.jsonl", make_texts(90))
    assert run("tokenizer", "--input", corpus, "--vocab-size", 330, "--out", root / "tok") == 0
    flags = ["--input", corpus, "--tokenizer", root / "tok", "--out", root / "shards"]
    flags += ["--seq-len", SEQ_LEN, "--valid-fraction", 0.2, "--shard-mb", 0.004, "--workers", 1]
    assert run("build", *flags) == 0
    return root / "shards"
