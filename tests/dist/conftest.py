"""Distributed tests: a pool of processes that live as long as the session."""

import pytest

from tests.data_prep.small_corpus import make_texts, run, write_jsonl
from tests.dist.process_pool import ProcessPool


@pytest.fixture(scope="session")
def pool():
    """Runs a function on 1 to 4 gloo processes: `pool(2, function, *args)` -> results by rank."""
    with ProcessPool(4) as processes:
        yield processes


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder of tiny shards: 16 tokens per row, 330 words."""
    root = tmp_path_factory.mktemp("shards")
    corpus = write_jsonl(root / "corpus.jsonl", make_texts(90))
    assert run("tokenizer", "--input", corpus, "--vocab-size", 330, "--out", root / "tok") == 0
    flags = ["--input", corpus, "--tokenizer", root / "tok", "--out", root / "shards"]
    flags += ["--seq-len", 16, "--valid-fraction", 0.2, "--shard-mb", 0.004, "--workers", 1]
    assert run("build", *flags) == 0
    return root / "shards"
