"""Damage of every kind: an error with its place, or rows counted in quarantine; never silence."""

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch

from benchmarks.loader.synthetic_shards import write_shards
from pretrain.config.ramp import BatchRamp
from pretrain.data import (
    CorruptShardError,
    DataCursor,
    DataError,
    DataPlan,
    Quarantine,
    TokenDataset,
    TrainLoader,
)
from xlstm_io.shards.manifest import load_manifest, write_manifest
from xlstm_io.shards.rows import Block
from xlstm_io.shards.shard import ShardReader
from xlstm_io.shards.writer import ShardWriter

SEQ_LEN = 8
FLIPS, TRUNCATIONS = 40, 8  # of each of the folder's five files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    write_shards(root, {"a": [13, 9]}, seq_len=SEQ_LEN, block_rows=5, document_tokens=4)
    return root


@pytest.fixture(scope="module")
def whole(folder):
    dataset = TokenDataset(folder, seq_len=SEQ_LEN)
    return dataset.read(np.arange(dataset.num_rows))


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def damages(size, rng):
    """(what, function of the file's bytes) of many flips, truncations and overwritten slices."""
    for place in [0, size - 1, *rng.sample(range(size), FLIPS)]:
        bit = 1 << rng.randrange(8)
        yield (
            f"bit {bit} at {place}",
            lambda b, p=place, v=bit: b[:p] + bytes([b[p] ^ v]) + b[p + 1 :],
        )
    for length in [0, size - 1, *rng.sample(range(size), TRUNCATIONS)]:
        yield f"cut to {length}", lambda b, n=length: b[:n]
    for place in rng.sample(range(size), TRUNCATIONS):
        yield f"64 zeros at {place}", lambda b, p=place: (b[:p] + bytes(64) + b[p + 64 :])[: len(b)]


def test_no_damage_passes(copy, whole):
    """Every flip and truncation of every file raises, and in quarantine only true rows count."""
    rng, tried = random.Random(1), 0
    for path in sorted(p for p in copy.rglob("*") if p.is_file()):
        original = path.read_bytes()
        for what, damage in damages(len(original), rng):
            broken = damage(original)
            if broken.rstrip() == original.rstrip():
                continue  # zeros over zeros, or the newline that ends the manifest
            tried += 1
            path.write_bytes(broken)
            with pytest.raises((CorruptShardError, DataError)) as caught:
                dataset = TokenDataset(copy, seq_len=SEQ_LEN)
                dataset.read(np.arange(dataset.num_rows))
                pytest.fail(f"{path.name}: {what} passed")
            assert path.name in str(caught.value), what
            if path.name == "manifest.json":
                continue  # no plan without it: an error in quarantine too
            dataset = TokenDataset(copy, seq_len=SEQ_LEN, quarantine=True)
            found = dataset.read(np.arange(dataset.num_rows))
            bad = {place for place, _ in found.damaged}
            assert bad, f"{path.name}: {what} passed"
            assert all(str(path.name) in error.path for _, error in found.damaged)
            damaged = np.isin(np.arange(dataset.num_rows), list(bad))
            assert not found.masks()[0][damaged].any() and not found.tokens[damaged].any()
            pairs = zip([found.tokens, *found.masks()], [whole.tokens, *whole.masks()], strict=True)
            assert all((a[~damaged] == b[~damaged]).all() for a, b in pairs)
        path.write_bytes(original)
    assert tried > 250


def test_an_error_names_path_block_offset_expected_and_got(copy):
    entry = load_manifest(copy).shards("train")[1]
    reader = ShardReader(load_manifest(copy), entry)
    offset = int(reader.index.off[1])
    raw = bytearray(reader.path.read_bytes())
    raw[offset + 3] ^= 16
    reader.path.write_bytes(raw)
    with pytest.raises(CorruptShardError) as caught:
        TokenDataset(copy, seq_len=SEQ_LEN).read(np.arange(22))
    error = caught.value
    assert (error.path, error.block, error.offset) == (str(reader.path), 1, offset)
    assert error.expected.startswith("xxh3 ") and error.got.startswith("xxh3 ")
    for part in (entry.path, "block 1", str(offset), error.expected, error.got, "restore"):
        assert part in str(error)


def test_manifest_of_another_folder_is_noticed(copy, tmp_path):
    """Another tokenizer, another token type: the hashes and sizes in it are not these files'."""
    for number, change in enumerate((dict(seed=9), dict(vocab_size=70_000), dict(vocab_size=900))):
        other = tmp_path / f"other{number}"
        write_shards(other, {"a": [13, 9]}, seq_len=SEQ_LEN, block_rows=5, **change)
        shutil.copy(other / "manifest.json", copy / "manifest.json")
        with pytest.raises((CorruptShardError, DataError), match=r"shard-0000000"):
            TokenDataset(copy, seq_len=SEQ_LEN).read(np.arange(22))
    fields = json.loads((copy / "manifest.json").read_text()) | {"dtype": "uint32"}
    del fields["hash"], fields["checksum"]
    write_manifest(copy, fields)
    with pytest.raises(DataError, match=r"dtype=uint32.* contradict vocab_size=900"):
        TokenDataset(copy, seq_len=SEQ_LEN)


def damaged_plan(copy):
    """A plan over shards of which one block is broken; the samples of its first epoch that are."""
    entry = load_manifest(copy).shards("train")[0]
    reader = ShardReader(load_manifest(copy), entry)
    raw = bytearray(reader.path.read_bytes())
    raw[int(reader.index.off[1])] ^= 1
    reader.path.write_bytes(raw)
    plan = DataPlan.of(TokenDataset(copy, seq_len=SEQ_LEN, quarantine=True), seed=2)
    _, rows = plan.locate(np.arange(22))
    return plan, np.flatnonzero((rows >= 5) & (rows < 10)).tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_quarantine_keeps_the_order_and_is_written_down(folder, copy, tmp_path, workers):
    plan, bad = damaged_plan(copy)
    sound = DataPlan.of(TokenDataset(folder, seq_len=SEQ_LEN), seed=2)
    assert len(bad) == 5
    file = tmp_path / "run" / "quarantine.jsonl"
    options = dict(micro_batch=1, workers=workers)
    met = []
    with (
        TrainLoader(plan, BatchRamp(2), quarantine=Quarantine(5, file), **options) as loader,
        TrainLoader(sound, BatchRamp(2), micro_batch=1) as expected,
    ):
        for step in range(11):
            for place, (a, b) in enumerate(zip(next(loader), next(expected), strict=True)):
                if 2 * step + place in bad:
                    met.append(2 * step + place)
                    assert a.loss_mask.sum() == 0 and (a.tokens == 0).all()
                else:
                    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.loss_mask, b.loss_mask)
            assert [row.sample for row in loader.cursor.quarantined] == met
        cursor = DataCursor.from_dict(json.loads(json.dumps(loader.cursor.to_dict())))
    assert cursor == loader.cursor and met == bad
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["sample"] for line in lines] == bad
    assert {(line["block"], line["source"]) for line in lines} == {(1, "")}
    assert all(line["got"].startswith("xxh3") and line["path"].endswith(".tar") for line in lines)
    known = Quarantine(5, file, cursor.quarantined)
    with (
        TrainLoader(plan, BatchRamp(2), step=11, quarantine=known, **options) as loader,
        pytest.raises(DataError, match=r"damaged rows, more than data.max_quarantined=5.*shard-0"),
    ):
        for _ in range(11):  # the second epoch meets the same rows again
            next(loader)


def test_other_ranks_rows_count_too(copy):
    plan, bad = damaged_plan(copy)
    quarantines = [Quarantine(5) for _ in range(2)]
    for rank, quarantine in enumerate(quarantines):
        options = dict(dp_rank=rank, dp_size=2, micro_batch=1, quarantine=quarantine)
        with TrainLoader(plan, BatchRamp(2), **options) as loader:
            for _ in range(11):
                next(loader)
    own = [[row.sample for row in quarantine.rows] for quarantine in quarantines]
    assert sorted(own[0] + own[1]) == bad and all(own)
    quarantines[0].merge(quarantines[1].take_new())
    assert [row.sample for row in quarantines[0].rows] == bad
    # A thousand ranks that send all that each has heard of would send a million rows.
    assert [row.sample for row in quarantines[0].take_new()] == own[0]
    assert not quarantines[0].take_new() and not quarantines[1].take_new()
    with pytest.raises(DataError, match=r"more than data\.max_quarantined=4"):
        Quarantine(4).merge(quarantines[0].rows)


def test_a_missing_shard_is_known_at_the_start_or_quarantined_whole(copy):
    entry = load_manifest(copy).shards("train")[1]
    (copy / entry.path).unlink()
    with pytest.raises(DataError, match=entry.path):
        TokenDataset(copy, seq_len=SEQ_LEN)
    found = TokenDataset(copy, seq_len=SEQ_LEN, quarantine=True).read(np.arange(22))
    assert [place for place, _ in found.damaged] == list(range(13, 22))


@pytest.mark.parametrize("keep_time", [False, True], ids=["edited", "with its old time"])
def test_tokens_that_change_after_their_first_check_are_noticed(copy, keep_time):
    """An edit shows by the file's times; whoever sets them back changes the inode's time."""
    data = TokenDataset(copy, seq_len=SEQ_LEN)
    data.read(np.arange(22))
    path = copy / data.manifest.shards("train")[0].path
    about = path.stat()
    reader = ShardReader(data.manifest, data.manifest.shards("train")[0])
    with open(path, "r+b") as file:
        file.seek(int(reader.index.off[0]) + 2)
        file.write(b"\1\0")
    if keep_time:
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    with pytest.raises(CorruptShardError, match="block 0"):
        data.read(np.arange(22))


def test_a_shard_that_was_replaced_while_it_was_closed_is_checked_again(copy):
    data = TokenDataset(copy, seq_len=SEQ_LEN)
    data.read(np.arange(22))
    data.close()
    path = copy / data.manifest.shards("train")[0].path
    raw = bytearray(path.read_bytes())
    raw[int(ShardReader(data.manifest, data.manifest.shards("train")[0]).index.off[0])] ^= 1
    path.unlink()
    path.write_bytes(raw)
    with pytest.raises(CorruptShardError, match="block 0"):
        data.read(np.arange(22))


def test_a_block_is_hashed_again_after_as_many_rows_as_it_has(copy, monkeypatch):
    """A disk may change bytes without a new time of the file."""
    manifest = load_manifest(copy)
    reader = ShardReader(manifest, manifest.shards("train")[0])
    hashed = []
    monkeypatch.setattr(
        reader, "block", lambda number, real=reader.block: hashed.append(number) or real(number)
    )
    out = np.empty(manifest.row_tokens, reader.dtype)
    for _ in range(3 * manifest.block_rows):
        reader.row(0, out)
    assert hashed == [0, 0, 0]
    reader.row(manifest.block_rows, out)
    assert hashed[3:] == [1]


def test_a_file_that_never_stands_still_is_an_error(copy, monkeypatch):
    manifest = load_manifest(copy)
    reader = ShardReader(manifest, manifest.shards("train")[0])
    monkeypatch.setattr(reader.checked, "follow", lambda descriptor: True)
    with pytest.raises(CorruptShardError, match="being written"):
        reader.row(0, np.empty(manifest.row_tokens, reader.dtype))


@pytest.mark.parametrize(
    ("change", "words"),
    {
        "ids": (lambda b: b.tokens.__setitem__((0, 0), 60_000), "not below vocab_size"),
        "reversed offsets": (lambda b: b.offsets.__setitem__(1, 0), "do not ascend"),
        "offsets beyond": (lambda b: b.offsets.__setitem__(1, 1 << 30), "do not ascend"),
        "positions": (lambda b: b.segments.__setitem__(0, 9999), "outside their rows"),
    }.values(),
    ids=["ids", "reversed offsets", "offsets beyond", "positions"],
)
def test_hostile_numbers_with_right_hashes_are_one_message(copy, change, words):
    """Whoever writes a folder also writes its hashes."""
    manifest = load_manifest(copy)
    entry = manifest.shards("train")[0]
    reader = ShardReader(manifest, entry)
    blocks = [reader.block(number) for number in range(reader.num_blocks)]
    with ShardWriter(copy / entry.path) as writer:
        for block in blocks:
            arrays = (array.copy() for array in vars(block).values() if array is not None)
            changed = Block(*arrays)
            change(changed)
            writer.write(changed)
        written = writer.close()
    fields = json.loads((copy / "manifest.json").read_bytes())
    fields["sources"][0]["splits"]["train"]["shards"][0] |= vars(written)
    write_manifest(copy, fields)
    with pytest.raises(CorruptShardError, match=words):
        TokenDataset(copy, seq_len=SEQ_LEN).read(np.arange(22))
