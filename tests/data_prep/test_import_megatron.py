"""Corpora of Megatron-LM: its own builder writes them, and every id comes back."""

import struct

import numpy as np
import pytest

from data_prep.sources.formats.megatron import MegatronCorpus
from data_prep.tools.repack import stored_documents
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


def write_corpus(prefix, documents) -> None:
    """PREFIX.bin and PREFIX.idx of uint16 arrays, each of them a document of one sequence."""
    sizes = np.array([len(ids) for ids in documents], "<i4")
    offsets = (2 * (np.cumsum(sizes) - sizes)).astype("<i8")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(sizes), len(sizes) + 1)
    bounds = np.arange(len(sizes) + 1, dtype="<i8")
    index = header + sizes.tobytes() + offsets.tobytes() + bounds.tobytes()
    prefix.with_suffix(".idx").write_bytes(index)
    prefix.with_suffix(".bin").write_bytes(b"".join(ids.tobytes() for ids in documents))


def test_an_eos_within_a_document_does_not_end_it_when_it_is_packed_again(tmp_path, tokenizer_dir):
    rng, eos = np.random.default_rng(0), open_tokenizer(tokenizer_dir).eos_id
    documents = []
    for length in rng.integers(5, 80, 60).tolist():
        ids = rng.integers(4, 300, length).astype("<u2")
        ids[:-1][rng.random(length - 1) < 0.2] = eos
        documents.append(ids)
    write_corpus(tmp_path / "c", documents)
    words = [tmp_path / "c", "--tokenizer", tokenizer_dir, "--seq-len", 16, "--workers", 1]
    words += ["--packing", "best_fit", "--valid-fraction", 0, "--out", tmp_path / "out"]
    assert run("import-megatron", *words) == 0
    assert run("repack", tmp_path / "out", "--seq-len", 32, "--workers", 1) == 0
    manifest = load_manifest(tmp_path / "out-32")
    (entry,) = manifest.shards("train")
    found = sorted(ids.tolist() for ids in stored_documents(manifest, entry))
    assert found == sorted([manifest.bos_id, *ids.tolist(), eos] for ids in documents)


def test_a_worker_reads_the_index_once_and_a_shortened_file_is_one_message(
    tmp_path, tokenizer_dir, monkeypatch, capsys
):
    write_corpus(tmp_path / "c", [np.full(40, 5, "<u2")] * 30)
    opened = []
    check = MegatronCorpus.__init__

    def counted(self, prefix):
        opened.append(prefix)
        check(self, prefix)
        if len(opened) == 2:  # after the tasks were cut
            self.bin.write_bytes(self.bin.read_bytes()[:1000])

    monkeypatch.setattr(MegatronCorpus, "__init__", counted)
    words = [tmp_path / "c", "--tokenizer", tokenizer_dir, "--workers", 1, "--shard-mb", 0.0004]
    assert run("import-megatron", *words, "--valid-fraction", 0, "--out", tmp_path / "out") == 2
    assert "c.bin: became shorter" in capsys.readouterr().err
    assert len(opened) == 2 and len(list(tmp_path.rglob("*.tar"))) > 1
