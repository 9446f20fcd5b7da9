"""Corpora of Megatron-LM: its own builder writes them, and every id comes back."""

import struct

import numpy as np
import pytest

from data_prep.sources.formats.megatron import MegatronCorpus
from tests.data_prep.small_corpus import documents_of, run, tree_bytes
from xlstm_io.errors import PrepError
from xlstm_io.shards.manifest import load_manifest
from xlstm_io.tokenizer import open_tokenizer


@pytest.fixture(scope="module")
def prefix(tmp_path_factory, tokenizer_dir, texts):
    """The corpus as Megatron-LM's own builder writes it, with eos behind documents."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    path = tmp_path_factory.mktemp("megatron") / "corpus/wiki_text_document"
    path.parent.mkdir()
    tokenizer = open_tokenizer(tokenizer_dir)
    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=np.uint16)
    for number, ids in enumerate(tokenizer.encode(texts)):
        whole = [*ids.tolist(), tokenizer.eos_id]
        cut = len(whole) // 2 if number % 5 == 0 else 0  # a document of two sequences
        parts = [whole[:cut], whole[cut:]] if cut else [whole]
        for part in parts:
            builder.add_item(torch.tensor(part))
        builder.end_document()
    builder.end_document()  # an empty document
    builder.finalize(f"{path}.idx")
    return path


def flags(prefix, tokenizer_dir) -> list:
    more = ["--seq-len", 16, "--valid-fraction", 0.2, "--shard-mb", 0.002, "--workers", 1]
    return [prefix, "--tokenizer", tokenizer_dir, *more]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_every_document_with_the_split_of_a_build(
    packing, prefix, tokenizer_dir, texts, shards, tmp_path, capsys
):
    arguments = [*flags(prefix, tokenizer_dir), "--packing", packing, "--out", tmp_path / "out"]
    assert run("import-megatron", *arguments) == 0
    for split in ("train", "valid"):
        assert documents_of(tmp_path / "out", split) == documents_of(shards, split)
    assert run("verify", tmp_path / "out", "--full") == 0
    manifest = load_manifest(tmp_path / "out")
    assert manifest.sources[0].documents_read == len(texts) + 1
    assert manifest.sources[0].dropped == {"empty": 1}
    assert len(manifest.shards("train")) > 2
    before = tree_bytes(tmp_path / "out")
    assert run("import-megatron", *arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    for path in list((tmp_path / "out").rglob("*.tar"))[:2]:
        path.unlink()
    (tmp_path / "out/manifest.json").unlink()
    assert run("import-megatron", *arguments) == 0
    assert tree_bytes(tmp_path / "out") == before


def test_bad_imports_are_one_message(prefix, tokenizer_dir, tmp_path, capsys, corpus):
    other = tmp_path / "small"
    assert run("tokenizer", "--input", corpus, "--vocab-size", 310, "--out", other) == 0
    capsys.readouterr()
    arguments = flags(prefix, tokenizer_dir)
    for wrong, message in (
        ([tmp_path / "none", *arguments[1:]], "give the path without .idx and .bin"),
        ([*arguments, "--tokenizer", other], "give the one that made them"),
        ([*arguments, "--seq-len", 1], "seq_len=1"),
        ([*arguments, "--source", "../up"], "source='../up'"),
    ):
        assert run("import-megatron", *wrong, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_damaged_indices_are_refused(prefix, tmp_path):
    index, tokens = (prefix.with_suffix(f".{kind}").read_bytes() for kind in ("idx", "bin"))
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 1 << 60, 5)
    for bad_index, bad_tokens in (
        (b"short", tokens),
        (b"X" + index[1:], tokens),
        (index[:-8], tokens),
        (header + index[34:], tokens),
        (index, tokens[:-2]),
        (index[:40] + b"\xff\xff\xff\xff" + index[44:], tokens),
    ):
        (tmp_path / "a.idx").write_bytes(bad_index)
        (tmp_path / "a.bin").write_bytes(bad_tokens)
        with pytest.raises(PrepError, match="a"):
            MegatronCorpus(str(tmp_path / "a"))
