import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

import data_prep
from tests.data_prep.small_corpus import run
from xlstm_io.errors import ShardFormatError
from xlstm_io.shards.index import CorruptShardError
from xlstm_io.shards.manifest import Manifest, load_manifest, write_manifest
from xlstm_io.shards.rows import parse_block
from xlstm_io.shards.shard import ShardReader, check_sizes
from xlstm_io.shards.writer import ShardWriter


def readers(root):
    manifest = load_manifest(root)
    for entry in manifest.shards("train") + manifest.shards("valid"):
        yield ShardReader(manifest, entry)


def read_all(root):
    """All rows one by one, the way training reads them."""
    found = []
    for reader in readers(root):
        for number in range(reader.entry.rows):
            tokens = np.empty(reader.row_tokens, reader.dtype)
            segments = reader.row(number, tokens)
            found.append((tokens.tolist(), segments.tolist()))
        reader.close()
    return found


def test_schema_is_the_shipped_one():
    shipped = Path(data_prep.__file__).with_name("manifest.schema.json")
    assert json.loads(shipped.read_text()) == Manifest.model_json_schema()


def test_manifest_on_disk_has_what_the_schema_requires(shards):
    fields = json.loads((shards / "manifest.json").read_text())
    schema = Manifest.model_json_schema()
    optional = {"labels", "parent"}
    assert set(schema["required"]) == set(fields) == set(schema["properties"]) - optional
    assert fields["row_tokens"] == fields["seq_len"] + 1


def test_manifest_reader_offers_the_tokenizer(shards):
    manifest = load_manifest(shards)
    assert manifest.tokenizer_path.is_absolute() and manifest.tokenizer_path.exists()
    assert (manifest.bos_id, manifest.pad_id, manifest.eos_id) == (0, 1, 2)
    assert manifest.vocab_size == 330 and len(manifest.hash) == 64
    assert load_manifest(shards / "manifest.json").hash == manifest.hash


def test_hash_names_the_data_not_the_code(shards, tmp_path):
    fields = json.loads((shards / "manifest.json").read_text())
    before = fields["hash"]
    fields["code"] = {"version": "another"}
    assert write_manifest(tmp_path, fields).hash == before
    fields["pad_id"] = 3
    assert write_manifest(tmp_path, fields).hash != before


def test_plain_webdataset_reads_the_tars(shards):
    manifest = load_manifest(shards)
    rows = []
    for entry in manifest.shards("train") + manifest.shards("valid"):
        samples = wds.WebDataset(str(manifest.root / entry.path), shardshuffle=False)
        for sample in samples:
            block = parse_block(sample["tok"], sample["doc"], manifest.row_tokens, manifest.dtype)
            bounds = zip(block.offsets[:-1], block.offsets[1:], strict=True)
            segments = [block.segments[a:b].tolist() for a, b in bounds]
            rows += zip(block.tokens.tolist(), segments, strict=True)
    assert rows == read_all(shards)


@pytest.fixture
def copy(shards, tmp_path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_a_shard_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []

    def synced(descriptor, real=os.fsync):
        calls.append(Path(f"/proc/self/fd/{descriptor}").readlink().name.split(".tmp.")[0])
        real(descriptor)

    def named(old, new, real=os.replace):
        calls.append(f"name {Path(new).name}")
        real(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    with ShardWriter(tmp_path / "train" / "s.tar") as writer:
        writer.close()
    tar, index = "s.tar", "s.idx.npz"
    assert calls == [tar, index, f"name {index}", "train", f"name {tar}", "train"]


def test_flipped_payload_names_block_and_offset(copy):
    reader = next(readers(copy))
    offset = int(reader.index.off[0])
    flip(reader.path, offset + 5)
    with pytest.raises(CorruptShardError) as caught:
        read_all(copy)
    error = caught.value
    assert (error.path, error.block, error.offset) == (str(reader.path), 0, offset)
    assert error.expected != error.got and str(offset) in str(error)


@pytest.mark.parametrize("cut", [1, 512, 3000])
def test_truncated_tar(copy, cut):
    path = next(readers(copy)).path
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CorruptShardError, match="bytes"):
        read_all(copy)


def test_missing_files(copy):
    path = next(readers(copy)).path
    path.with_suffix("").with_suffix(".idx.npz").unlink()
    with pytest.raises(CorruptShardError, match=r"\.idx\.npz: the file is missing; restore"):
        read_all(copy)


def test_sizes_of_all_shards_are_those_of_each(copy):
    """Files and folders that are links, and what stands in place of a shard."""
    manifest = load_manifest(copy)
    entries = manifest.shards("train")
    check_sizes(copy, entries)
    tar, folder = copy / entries[0].path, (copy / entries[0].path).parent
    elsewhere = tar.rename(copy / "elsewhere.tar")
    with pytest.raises(CorruptShardError, match="the file is missing"):
        check_sizes(copy, entries)
    tar.symlink_to(elsewhere)
    check_sizes(copy, entries)
    tar.unlink()
    os.mkfifo(tar)
    with pytest.raises(CorruptShardError, match="is not a plain file"):
        check_sizes(copy, entries)
    tar.unlink()
    elsewhere.rename(tar)
    inside = folder.rename(copy / "other")
    folder.symlink_to(inside)
    check_sizes(copy, entries)
    folder.unlink()
    outside = inside.rename(copy.parent / "outside")
    with pytest.raises(CorruptShardError, match="the file is missing"):
        check_sizes(copy, entries)
    folder.symlink_to(outside)
    with pytest.raises(ShardFormatError, match="a link leads to"):
        check_sizes(copy, entries)


def test_fuzz_every_flip_is_noticed(copy):
    """A flip anywhere fails `verify --full`; reading rows fails or gives the very same rows."""
    truth = read_all(copy)
    rng = np.random.default_rng(0)
    files = [p for p in copy.rglob("*") if p.is_file() and "_work" not in p.parts]
    harmless = 0
    for _ in range(80):
        path = files[rng.integers(len(files))]
        offset, bit = int(rng.integers(path.stat().st_size)), int(rng.integers(8))
        flip(path, offset, bit)
        assert run("verify", copy, "--full") == 2, (path, offset, bit)
        if path.name != "tokenizer.model":
            try:
                assert read_all(copy) == truth
                harmless += 1  # a tar header or padding, which this reader does not use
            except ShardFormatError:
                pass
        flip(path, offset, bit)
    assert run("verify", copy, "--full") == 0
    assert harmless < 40


def test_manifest_errors(copy):
    manifest = copy / "manifest.json"
    text = manifest.read_text()
    for bad, message in (
        (text[:-40], "not valid JSON"),
        (text.replace('"seq_len": 16', '"seq_len": 17'), "checksum"),
        (text.replace('"version": 1', '"version": 9'), "version=9"),
        ("[]", "not valid JSON"),
    ):
        manifest.write_text(bad)
        with pytest.raises(ShardFormatError, match=message):
            load_manifest(copy)
    manifest.unlink()
    with pytest.raises(ShardFormatError, match="unfinished"):
        load_manifest(copy)
    with pytest.raises(ShardFormatError, match="not a folder"):
        load_manifest(copy / "nowhere")


def test_every_byte_of_a_tar_is_vouched_for(copy):
    """Payloads, headers, padding and the end of the archive: any other byte is an error."""
    manifest = load_manifest(copy)
    entry = manifest.shards("train")[0]
    path = copy / entry.path
    whole = path.read_bytes()
    places = [*random.Random(0).sample(range(len(whole)), 60), 0, 511, len(whole) - 1]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        reader = ShardReader(manifest, entry)
        with pytest.raises(CorruptShardError):
            for number in range(reader.num_blocks):
                reader.block(number)
        reader.close()
