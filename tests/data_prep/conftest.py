"""A tiny corpus, its tokenizer, and its shards, made once."""

from pathlib import Path

import pytest

from tests.data_prep.small_corpus import make_texts, run, write_jsonl


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, texts) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory, corpus) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    assert run("tokenizer", "--input", corpus, "--vocab-size", 330, "--out", out) == 0
    return out


@pytest.fixture(scope="session")
def build_flags(corpus, tokenizer_dir) -> list:
    """Flags of a build into several shards with both splits; add --out."""
    return [
        *("--input", corpus, "--tokenizer", tokenizer_dir, "--seq-len", 16),
        *("--valid-fraction", 0.2, "--shard-mb", 0.005, "--workers", 1),
    ]


@pytest.fixture(scope="session")
def shards(tmp_path_factory, build_flags) -> Path:
    out = tmp_path_factory.mktemp("shards")
    assert run("build", *build_flags, "--out", out) == 0
    return out
