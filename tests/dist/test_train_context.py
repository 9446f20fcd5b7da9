"""The trainer itself with a sequence cut over processes: losses, validation, checkpoints."""

import pytest

from pretrain.checkpoint import find_latest
from pretrain.commands.after_run.evaluate import evaluate
from pretrain.watching.metrics import read_metrics
from tests.data_prep.small_corpus import make_texts, run, write_jsonl
from tests.dist import work

SEQ_LEN = 24


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("context")
    corpus = write_jsonl(root / "corpus.jsonl", make_texts(60))
    assert run("tokenizer", "--input", corpus, "--vocab-size", 330, "--out", root / "tok") == 0
    flags = ["--input", corpus, "--tokenizer", root / "tok", "--out", root / "shards"]
    flags += ["--seq-len", SEQ_LEN, "--valid-fraction", 0.2, "--workers", 1]
    assert run("build", *flags) == 0
    return root / "shards"


def train(config):
    from pretrain.commands.run.train import main

    return main(config)


def run_config(shards, folder, **changes):
    return work.run_config(
        "classic",
        data__path=str(shards),
        data__seq_len=SEQ_LEN,
        data__micro_batch=2,
        model__vocab_size=336,
        run__dir=str(folder),
        run__steps=3,
        **changes,
    )


@pytest.mark.dist
def test_training_in_slices_equals_training_whole_rows(pool, shards, tmp_path):
    assert pool(1, train, run_config(shards, tmp_path / "one")) == [0]
    cut = run_config(shards, tmp_path / "cut", layout__context=2)
    assert pool(4, train, cut) == [0] * 4  # CP 2 x DP 2
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "cut"))
    for key, count in (("loss", 2), ("valid_loss", 1), ("grad_norm", 2), ("tokens", 2)):
        expected = [record[key] for record in one if key in record]
        got = [record[key] for record in two if key in record]
        assert len(expected) == count
        assert got == pytest.approx(expected, rel=1e-5), key
    # the checkpoint knows nothing of slices: one process computes the same validation loss
    (measured,) = evaluate(str(find_latest(tmp_path / "cut")), cut).values()
    valid = next(record["valid_loss"] for record in two if "valid_loss" in record)
    assert measured.loss == pytest.approx(valid, rel=1e-5)
