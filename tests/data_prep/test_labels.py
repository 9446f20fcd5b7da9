"""Labels in shards: they stay with their tokens, and shards without them stay as they were."""

import shutil

import numpy as np
import pytest
import webdataset as wds
import xxhash

from data_prep.build.pack import as_stored, make_packer, write_shard
from data_prep.tools.ngram_baselines import _pairs
from data_prep.tools.repack import stored_documents
from tests.data_prep.small_corpus import make_texts, run, write_jsonl
from xlstm_io.shards.index import BlockIndex, CorruptShardError
from xlstm_io.shards.manifest import load_manifest, write_manifest
from xlstm_io.shards.rows import Block, no_label, parse_block, row_masks
from xlstm_io.shards.shard import ShardReader
from xlstm_io.shards.writer import ShardWriter

DTYPE = np.dtype("<u2")
NONE = no_label(DTYPE)
BOS, EOS, PAD, VOCAB = 0, 2, 1, 300
TOKENIZER = "tests/data/golden/0.1.0/shards/tokenizer"

# Made by the code of version 0.1.0, which knew no labels.
STORED = {
    "concat": ("df954ee9f487343f", "aab5ee236c98a8d8"),
    "best_fit": ("124ccd7d9c6ff847", "f5a3aeb6f587c76c"),
}
MANIFESTS = {
    "concat": "c31223b7250fc754faf16b359dbe38238f42b7c459e9b22ddaa5e16ccf39ff0e",
    "best_fit": "6b73b330ead4575db8cba3041742e73d7124ef90d75527cda668494837aa8719",
}
PACKINGS = pytest.mark.parametrize("packing", ["concat", "best_fit"])


def plain_documents():
    rng = np.random.default_rng(5)
    for length in rng.integers(0, 60, 300):
        yield as_stored(rng.integers(3, VOCAB, length), BOS, EOS, DTYPE)


def labelled_documents(seed=0, count=80, longest=60):
    """Documents [2, n] with any label at about half of the positions; the last one has none."""
    rng = np.random.default_rng(seed)
    for length in rng.integers(0, longest, count):
        tokens = as_stored(rng.integers(3, VOCAB, length), BOS, EOS, DTYPE)
        labels = rng.integers(0, VOCAB, len(tokens)).astype(DTYPE)
        labels[rng.random(len(tokens)) < 0.5] = NONE
        labels[-1] = NONE
        yield np.stack([tokens, labels])


def write(root, packing, seq_len, documents, labels=True):
    """A folder of one shard, with its manifest."""
    documents = list(documents)
    packer = make_packer(packing, seq_len, DTYPE, PAD, labels)
    entry = write_shard(root, "a/train/shard-00000000.tar", documents, packer, bytes_in=7)
    golden = load_manifest(TOKENIZER.removesuffix("/tokenizer"))
    fields = golden.model_dump(exclude={"hash", "checksum"})
    shutil.copytree(TOKENIZER, root / "tokenizer")
    totals = {k: getattr(entry, k) for k in ("rows", "tokens", "targets", "pad_tokens", "docs")}
    split = {**totals, "bytes_in": 7, "shards": [entry.model_dump()]}
    source = {**fields["sources"][0], "name": "a", "splits": {"train": split}}
    fields |= {"seq_len": seq_len, "row_tokens": seq_len + 1, "packing": packing}
    fields |= {"pad_id": PAD, "bos_id": BOS, "eos_id": EOS, "sources": [source], "labels": labels}
    return write_manifest(root, fields)


def read_rows(manifest):
    """Tokens, segments and labels of each row, one by one."""
    (entry,) = manifest.shards("train")
    reader = ShardReader(manifest, entry)
    rows = []
    for number in range(entry.rows):
        tokens, labels = np.empty(manifest.row_tokens, DTYPE), np.empty(manifest.seq_len, DTYPE)
        segments = reader.row(number, tokens, labels)
        rows.append((tokens, segments, labels))
    reader.close()
    return rows


def as_pairs(documents):
    return sorted(tuple(map(tuple, document.tolist())) for document in documents)


@PACKINGS
def test_shards_without_labels_keep_their_bytes(packing, tmp_path):
    packer = make_packer(packing, 16, DTYPE, PAD)
    entry = write_shard(tmp_path, "c/shard.tar", plain_documents(), packer, bytes_in=7)
    assert (entry.xxh3, entry.index_xxh3) == STORED[packing]
    assert entry.targets == 9045


@PACKINGS
def test_ordinary_builds_keep_their_manifest_hash(packing, tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_texts(60))
    flags = ["--input", corpus, "--tokenizer", TOKENIZER, "--seq-len", 16, "--packing", packing]
    flags += ["--valid-fraction", 0.2, "--workers", 1, "--out", tmp_path / "out"]
    assert run("build", *flags) == 0
    assert load_manifest(tmp_path / "out").hash == MANIFESTS[packing]


@PACKINGS
@pytest.mark.parametrize("seq_len", [2, 5, 16, 100])
def test_each_label_stands_once_beside_its_token(packing, seq_len, tmp_path):
    documents = list(labelled_documents())
    manifest = write(tmp_path, packing, seq_len, documents)
    given = sum(int((document[1] != NONE).sum()) for document in documents)
    assert manifest.shards("train")[0].targets == given
    found = 0
    for _, segments, labels in read_rows(manifest):
        mask, _ = row_masks(np.zeros(len(segments), np.int64), segments, (1, seq_len))
        assert (labels[mask[0] == 0] == NONE).all()  # where the next token is another document's
        found += int((labels != NONE).sum())
    assert found == given
    assert as_pairs(stored_documents(manifest, manifest.shards("train")[0])) == as_pairs(documents)
    assert run("verify", tmp_path, "--full") == 0


@pytest.mark.parametrize("before", ["concat", "best_fit"])
@pytest.mark.parametrize("after", ["concat", "best_fit"])
@pytest.mark.parametrize("seq_len", [3, 24])
def test_repacked_shards_have_the_same_labels(before, after, seq_len, tmp_path):
    documents = list(labelled_documents(seed=1))
    write(tmp_path / "a", before, 16, documents)
    flags = ["--seq-len", seq_len, "--packing", after, "--out", tmp_path / "b", "--workers", 1]
    assert run("repack", tmp_path / "a", *flags) == 0
    assert run("verify", tmp_path / "b", "--full") == 0
    manifest = load_manifest(tmp_path / "b")
    assert as_pairs(stored_documents(manifest, manifest.shards("train")[0])) == as_pairs(documents)


def test_plain_webdataset_reads_labels(tmp_path):
    manifest = write(tmp_path, "best_fit", 16, labelled_documents())
    path = tmp_path / manifest.shards("train")[0].path
    rows = []
    for sample in wds.WebDataset(str(path), shardshuffle=False):
        block = parse_block(sample["tok"], sample["doc"], 17, "uint16", sample["lab"])
        rows += block.labels.tolist()
    assert rows == [labels.tolist() for _, _, labels in read_rows(manifest)]


def test_every_byte_of_labels_is_checked(tmp_path):
    manifest = write(tmp_path, "concat", 16, labelled_documents())
    (entry,) = manifest.shards("train")
    path = tmp_path / entry.path
    whole = path.read_bytes()
    reader = ShardReader(manifest, entry)
    offset, size = int(reader.index.lab_off[0]), int(reader.index.lab_size[0])
    reader.close()
    for place in (offset - 512, offset, offset + size - 1, offset + size, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        reader = ShardReader(manifest, entry)
        with pytest.raises(CorruptShardError):
            reader.row(0, np.empty(17, DTYPE), np.empty(16, DTYPE))
        reader.close()


def test_verify_finds_labels_that_cannot_be(tmp_path, capsys):
    """A label above the vocabulary, one in padding, labels that the manifest denies or promises."""

    def problems(labels, manifest_labels=True):
        root = tmp_path / f"case{len(list(tmp_path.iterdir()))}"
        manifest = write(root, "best_fit", 4, [np.array([[BOS, 5, EOS], [5, EOS, NONE]], DTYPE)])
        fields = manifest.model_dump(exclude={"hash", "checksum"})
        entry = fields["sources"][0]["splits"]["train"]["shards"][0]
        tokens = np.array([[BOS, 5, EOS, PAD, PAD]], DTYPE)
        numbers = (np.array(part, np.uint32) for part in ([0, 2], [0, 3 | 1 << 30], [0, 2**32 - 1]))
        rows = None if labels is None else np.array([labels], DTYPE)
        with ShardWriter(root / entry["path"]) as writer:
            writer.write(Block(tokens, *numbers, rows))
            written = writer.close()
        entry |= {k: getattr(written, k) for k in ("rows", "bytes", "xxh3", "index_xxh3")}
        fields["labels"] = manifest_labels
        write_manifest(root, fields)
        code = run("verify", root, "--full")
        return code, capsys.readouterr().out

    assert problems([5, EOS, NONE, NONE])[0] == 0
    for labels, manifest_labels, says in (
        ([5, 64_000, NONE, NONE], True, "the label 64000, which is not below vocab_size=600"),
        ([5, NONE, NONE, EOS], True, "row 0 has labels in its padding"),
        ([5, NONE, NONE, NONE], True, "1 targets, the manifest says 1 and 2"),
        ([5, EOS, NONE, NONE], False, "expected zeros to the end, got other bytes"),
        (None, True, "'lab_off.npy'"),
    ):
        code, out = problems(labels, manifest_labels)
        assert code == 2 and says in out, out


def test_folders_with_and_without_labels_are_not_joined(tmp_path, capsys):
    plain = (document[0] for document in labelled_documents())
    write(tmp_path / "a", "concat", 16, labelled_documents())
    write(tmp_path / "b", "concat", 16, plain, labels=False)
    assert run("merge", tmp_path / "c", "--inputs", tmp_path / "a", tmp_path / "b") == 2
    assert "labels True and False" in capsys.readouterr().err


def test_inspect_shows_labels_and_baselines_count_them(tmp_path, capsys):
    document = np.array([[BOS, 40, 41, 42, EOS], [NONE, NONE, 99, 98, NONE]], DTYPE)
    manifest = write(tmp_path, "best_fit", 8, [document])
    assert run("inspect", tmp_path, "--row", 0) == 0
    assert "    labels of 2..3: " in capsys.readouterr().out
    assert run("inspect", tmp_path) == 0
    assert "best_fit, with labels" in capsys.readouterr().out
    (pairs,) = _pairs(manifest, "train", None)
    assert pairs.tolist() == [41 * 600 + 99, 42 * 600 + 98]


def test_an_index_with_some_columns_of_labels_is_damaged(tmp_path):
    columns = {name: np.zeros(1, np.uint64) for name in ("off", "size", "xxh3", "rows")}
    columns |= {f"doc_{name}": columns["off"] for name in ("off", "size", "xxh3")}
    path = tmp_path / "x.idx.npz"
    every = ("lab_off", "lab_size", "lab_xxh3")
    for extra, labels, good in (((), False, True), (every[:1], True, False), (every, True, True)):
        np.savez(path, **columns, **{name: columns["off"] for name in extra})
        digest = xxhash.xxh3_64_hexdigest(path.read_bytes())
        if good:
            found = BlockIndex.load(path, digest, labels=labels)
            assert (found.lab_off is None) == (not labels)
        else:
            with pytest.raises(CorruptShardError, match="a readable index"):
                BlockIndex.load(path, digest, labels=labels)
