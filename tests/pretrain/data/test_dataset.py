import os
import shutil

import numpy as np
import pytest

from benchmarks.loader.start import SEQ_LEN, many_shards
from pretrain.data import CorruptShardError, DataError, TokenDataset
from pretrain.data import dataset as dataset_module
from xlstm_io.shards.shard import ShardReader


def test_rows_boundaries_and_masks_agree_with_the_tokens(shards):
    """In these rows a document starts exactly where a bos token stands."""
    data = TokenDataset(shards, "train", seq_len=16)
    rows = data.read(np.arange(data.num_rows))
    tokens, (loss_mask, boundaries) = rows.tokens, rows.masks()
    manifest = data.manifest
    assert tokens.dtype == np.uint16 and loss_mask.dtype == np.float32 and boundaries.dtype == bool
    assert ((tokens[:, :-1] == manifest.bos_id) == boundaries).all()
    targets = tokens[:, 1:]
    expected = (targets != manifest.bos_id) & (targets != manifest.pad_id)
    assert (loss_mask.astype(bool) == expected).all()
    assert loss_mask.sum() == manifest.sources[0].splits["train"].targets
    assert data.num_rows == len(data) == manifest.sources[0].splits["train"].rows


def test_random_access_equals_sequential(shards):
    data = TokenDataset(shards, "train", seq_len=16)
    everything = data.read(np.arange(data.num_rows))
    order = np.random.default_rng(0).integers(0, data.num_rows, 50)
    part = data.read(order)
    assert (everything.tokens[order] == part.tokens).all()
    for whole, some in zip(everything.masks(), part.masks(), strict=True):
        assert (whole[order] == some).all()
    with pytest.raises(IndexError):
        data.read(np.array([data.num_rows]))


def test_open_files_are_bounded(shards, monkeypatch):
    monkeypatch.setattr(dataset_module, "_MAX_OPEN_SHARDS", 1)
    data = TokenDataset(shards, "train", seq_len=16)
    assert len(data.manifest.shards("train")) > 1
    data.read(np.arange(data.num_rows))
    assert len(data._open) == 1
    data.close()
    assert not data._open and len(data.read(np.array([0])).tokens) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(seq_len=32), "data.seq_len=32 is not the seq_len=16"),
        (dict(split="test"), "no 'test' rows"),
        (dict(path="nowhere"), "not a folder of shards"),
        (dict(source="web"), "no source 'web'; it has corpus"),
    ],
)
def test_unusable_data_is_a_config_error(shards, change, message):
    arguments = dict(path=shards, split="train", seq_len=16) | change
    with pytest.raises(DataError, match=message):
        TokenDataset(**arguments)


def test_missing_or_short_shard_is_noticed_at_once(shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "copy")
    tar = sorted(copy.rglob("train/*.tar"))[-1]
    tar.write_bytes(tar.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{tar.name}.*expected"):
        TokenDataset(copy, "train", seq_len=16)
    tar.unlink()
    with pytest.raises(DataError, match=tar.name):
        TokenDataset(copy, "train", seq_len=16)
    (copy / "manifest.json").unlink()
    with pytest.raises(DataError, match="unfinished"):
        TokenDataset(copy, "train", seq_len=16)


def test_of_many_processes_one_looks_at_all_shards(shards, tmp_path, monkeypatch):
    """20,000 shards times 1,024 ranks are more than the server of a file system answers."""
    copy = shutil.copytree(shards, tmp_path / "copy")
    tar = sorted(copy.rglob("train/*.tar"))[-1]
    tar.write_bytes(tar.read_bytes()[:-1])
    looked, real = [], dataset_module.check_sizes
    monkeypatch.setattr(dataset_module, "check_sizes", lambda *a: looked.append(a) or real(*a))
    data = TokenDataset(copy, "train", seq_len=16, check_files=False)
    assert not looked
    with pytest.raises(CorruptShardError, match=f"{tar.name}.*expected"):  # what is read is checked
        data.read(np.arange(data.num_rows))
    with pytest.raises(DataError, match=f"{tar.name}.*expected"):  # a node's own disk
        TokenDataset(shards, "train", seq_len=16, copy=str(copy), check_files=False)


def test_folders_and_not_shards_are_searched_for_links(tmp_path, monkeypatch):
    """A walk along the path of each shard took most of a start over 20,000 of them."""
    many_shards(tmp_path, 300)
    resolved, real = [], os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda *a, **o: resolved.append(a) or real(*a, **o))
    assert len(TokenDataset(tmp_path, "train", seq_len=SEQ_LEN).shard_rows) == 300
    assert len(resolved) < 10


def test_damaged_block_is_an_error_when_it_is_read(shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "copy")
    data = TokenDataset(copy, "train", seq_len=16)
    entry = data.manifest.shards("train")[1]
    reader = ShardReader(data.manifest, entry)
    raw = bytearray(reader.path.read_bytes())
    raw[int(reader.index.doc_off[0]) + 1] ^= 4
    reader.path.write_bytes(raw)
    data.read(np.array([0]))  # another shard
    with pytest.raises(CorruptShardError) as caught:
        data.read(np.arange(data.num_rows))
    assert caught.value.block == 0 and caught.value.offset == reader.index.doc_off[0]
