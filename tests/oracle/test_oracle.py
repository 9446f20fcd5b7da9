"""A run's losses are those of a trainer that shares no code with it.

1,000 steps on more text: `python -m tests.oracle.compare SHARDS --work FOLDER`.
"""

import ast
from pathlib import Path

import pytest

from tests.data_prep.small_corpus import make_texts, run, write_jsonl
from tests.oracle import compare, train
from xlstm_io.shards.manifest import load_manifest

SIZE = "--steps 20 --hidden 32 --heads 2 --blocks 2 --batch 8".split()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oracle")
    corpus = write_jsonl(folder / "texts.jsonl", make_texts(400))
    assert run("tokenizer", "--input", corpus, "--vocab-size", 330, "--out", folder / "tok") == 0
    words = ("--seq-len", 64, "--valid-fraction", 0.1, "--shard-mb", 0.01)
    build = ("build", "--input", corpus, "--tokenizer", folder / "tok", "--out", folder / "shards")
    assert run(*build, *words) == 0
    return folder / "shards"


def test_losses_are_those_of_plain_torch(shards, tmp_path, warm_python):
    """Tensor parallel over two processes beside one: weights, order, clipping, decay, schedule."""
    words = [str(shards), "--work", str(tmp_path / "work"), "--figure", str(tmp_path / "both.png")]
    losses = compare.main([*words, *SIZE], str(warm_python.executable))
    assert (tmp_path / "both.png").stat().st_size
    assert len(losses.ours) == 20 and losses.ours[-1] < losses.ours[0] - 0.5
    assert max(losses.differences()) < 1e-5
    assert abs(losses.valid[0] - losses.valid[1]) < 1e-5


def test_plain_webdataset_finds_every_target_in_more_than_one_epoch(shards):
    rows = train.read_rows(shards, "train")
    manifest = load_manifest(shards)
    (split,) = [source.splits["train"] for source in manifest.sources]
    assert len(rows) == split.rows and len(split.shards) > 1
    pairs = [pair for row in rows for pair in train.documents(*row)]
    assert sum(len(targets) for _, targets in pairs) == split.targets
    for epoch in range(3):
        samples = range(epoch * len(rows), (epoch + 1) * len(rows))
        found = [train.row_of(sample, len(rows), seed=7) for sample in samples]
        assert sorted(found) == list(range(len(rows)))


def test_the_oracle_imports_nothing_of_this_project():
    tree = ast.parse(Path(train.__file__).read_text())
    names = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    ours = {"pretrain", "xlstm_mcore", "xlstm_io", "xlstm_kernels", "data_prep", "slurm", "tests"}
    assert not {name.split(".")[0] for name in names} & ours
