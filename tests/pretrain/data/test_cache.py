"""Remote shards: the same rows, verified copies, bounded bytes, several processes at once."""

import os
import shutil

import fsspec
import numpy as np
import pytest

from benchmarks.loader.synthetic_shards import write_shards
from pretrain.config.ramp import BatchRamp
from pretrain.data import DataError, DataPlan, TokenDataset, TrainLoader, cache
from pretrain.data.cache import CacheSettings
from tests.clean_processes import CLEAN
from tests.http_server import serve
from xlstm_io.errors import ShardFormatError
from xlstm_io.shards.index import CorruptShardError

SIZES = [30, 20, 25, 22]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("remote")
    write_shards(root, {"a": SIZES}, seq_len=16, block_rows=8, valid_rows=3)
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.model").write_bytes(b"model")
    return root


def remote(folder, tmp_path, limit=10**9, **options):
    settings = CacheSettings(tmp_path / "cache", limit)
    return TokenDataset(f"file://{folder}", seq_len=16, cache=settings, **options)


def copies(tmp_path):
    return sorted((tmp_path / "cache").rglob("*.tar"))


def whole(folder):
    return TokenDataset(folder, seq_len=16).read(np.arange(sum(SIZES))).tokens


def test_rows_come_from_copies_made_when_they_are_needed(folder, tmp_path):
    data = remote(folder, tmp_path)
    assert not copies(tmp_path) and data.manifest.tokenizer_path.read_bytes() == b"model"
    data.read(np.array([0, 29]))
    assert [path.name for path in copies(tmp_path)] == ["shard-00000000.tar"]
    assert (data.read(np.arange(97)).tokens == whole(folder)).all()
    assert len(copies(tmp_path)) == 4 and not list(tmp_path.rglob("*.tmp.*"))
    before = [path.stat().st_ino for path in copies(tmp_path)]
    assert (remote(folder, tmp_path).read(np.arange(97)).tokens == whole(folder)).all()
    assert [path.stat().st_ino for path in copies(tmp_path)] == before, "copied once"
    assert remote(folder, tmp_path, split="valid").num_rows == 3


def test_a_place_for_copies_that_cannot_be_written_is_one_message(folder, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(DataError, match=r"data.cache_dir=.*cache cannot be written"):
        remote(folder, tmp_path)


def test_an_object_store_works_alike(folder, tmp_path):
    fs = fsspec.filesystem("memory")
    fs.put(str(folder), "/bucket", recursive=True)
    settings = CacheSettings(tmp_path / "cache", 10**9)
    data = TokenDataset("memory://bucket", seq_len=16, cache=settings)
    assert (data.read(np.arange(97)).tokens == whole(folder)).all()
    fs.rm("/bucket", recursive=True)
    with pytest.raises(DataError, match=r"memory://bucket/manifest.json does not exist"):
        TokenDataset("memory://bucket", seq_len=16, cache=settings)
    with pytest.raises(DataError, match="cannot be read"):
        TokenDataset("nosuch://bucket", seq_len=16, cache=settings)


def test_the_least_recently_opened_copies_make_room(folder, tmp_path):
    size = max(path.stat().st_size for path in folder.rglob("*.tar"))
    data = remote(folder, tmp_path, limit=2 * size + 100)
    data.max_open = 1
    for row, kept in ((0, [0]), (40, [0, 1]), (0, [0, 1]), (60, [0, 2]), (90, [2, 3])):
        data.read(np.array([row]))
        assert [int(path.stem[-1]) for path in copies(tmp_path)] == kept
    assert (data.read(np.arange(97)).tokens == whole(folder)).all()
    assert len(copies(tmp_path)) == 2 == len(list((tmp_path / "cache").rglob("*.npz")))
    with pytest.raises(ShardFormatError, match="is less than one shard"):
        remote(folder, tmp_path / "small", limit=size // 2).read(np.array([0]))


def test_a_broken_transfer_is_tried_again_and_a_damaged_object_refused(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(cache, "_PAUSE_SECONDS", 0)
    good, calls = cache.ShardCache._copy, []

    def torn(self, path, target):
        calls.append(path)
        got = good(self, path, target)
        if path.endswith(".tar") and len(calls) < 4:
            target.write(b"torn")
            return "0" * 16
        return got

    monkeypatch.setattr(cache.ShardCache, "_copy", torn)
    assert (remote(folder, tmp_path).read(np.arange(30)).tokens == whole(folder)[:30]).all()
    assert len(calls) == 4
    monkeypatch.setattr(cache.ShardCache, "_copy", good)

    copy = shutil.copytree(folder, tmp_path / "damaged")
    tar = sorted(copy.rglob("train/*.tar"))[1]
    raw = bytearray(tar.read_bytes())
    raw[600] ^= 8
    tar.write_bytes(raw)
    data = remote(copy, tmp_path / "other")
    with pytest.raises(CorruptShardError, match=r"file://.*shard-00000001.tar.*xxh3.*3 times"):
        data.read(np.array([30]))
    tar.unlink()
    with pytest.raises(DataError, match=r"shard-00000001.tar.*no such file"):
        remote(copy, tmp_path / "other")
    found = remote(copy, tmp_path / "other", quarantine=True).read(np.arange(97))
    assert [place for place, _ in found.damaged] == list(range(30, 50))


def test_copies_are_not_looked_at_one_by_one_for_each_new_one(folder, tmp_path, monkeypatch):
    """Of 30,000 copies that took three seconds, with all processes waiting."""
    size = max(path.stat().st_size for path in folder.rglob("*.tar"))
    looked = []
    count = cache.ShardCache._delete_until

    def counted(self, needed):
        looked.append(needed)
        return count(self, needed)

    monkeypatch.setattr(cache.ShardCache, "_delete_until", counted)
    assert (remote(folder, tmp_path).read(np.arange(97)).tokens == whole(folder)).all()
    assert len(looked) == 1 and len(copies(tmp_path)) == 4  # the first finds no note
    (tmp_path / "cache/locks/bytes").write_text("")  # of a machine that went down
    copies(tmp_path)[0].unlink()
    remote(folder, tmp_path).read(np.arange(30))
    assert len(looked) == 2
    monkeypatch.setattr(cache, "_SPARE_SHARE", 2)
    copies(tmp_path)[0].unlink()
    limit = sum(path.stat().st_size for path in copies(tmp_path)) + size - 1
    remote(folder, tmp_path, limit=limit).read(np.arange(30))
    assert len(looked) == 3 and len(copies(tmp_path)) < 3  # room for more than this one
    remote(folder, tmp_path, limit=limit).read(np.arange(30, 50))
    assert len(looked) == 3


@pytest.mark.parametrize("damage", ["flipped", "cut", "index"])
def test_a_damaged_copy_is_made_again(folder, tmp_path, caplog, damage):
    """The disk of a node fails, not the object store: a run need not end, nor lose the rows."""
    remote(folder, tmp_path).read(np.arange(97))
    tar = copies(tmp_path)[1]
    raw = bytearray(tar.read_bytes())
    raw[600] ^= 8
    if damage == "index":
        tar.with_suffix(".idx.npz").write_bytes(b"")
    else:
        tar.write_bytes(raw if damage == "flipped" else raw[:2000])
    for quarantine in (False, True):
        found = remote(folder, tmp_path, quarantine=quarantine).read(np.arange(97))
        assert (found.tokens == whole(folder)).all() and not found.damaged
    assert caplog.text.count("this copy is damaged") == 1


def test_a_damaged_copy_is_made_again_where_another_shard_is_beyond_help(folder, tmp_path):
    """What is known to be damaged is looked up by the index, which may be what is damaged."""
    copy = shutil.copytree(folder, tmp_path / "remote")
    remote(copy, tmp_path).read(np.arange(97))
    first, second = copies(tmp_path)[:2]
    second.with_suffix(".idx.npz").write_bytes(b"")
    first.unlink()
    sorted(copy.rglob("train/*.tar"))[0].unlink()
    found = remote(copy, tmp_path, quarantine=True).read(np.arange(97))
    assert [place for place, _ in found.damaged] == list(range(30))
    assert (found.tokens[30:] == whole(folder)[30:]).all()


def test_a_copy_may_go_while_all_are_counted(folder, tmp_path):
    """Another process drops a damaged one without the lock of those that make room."""
    data = remote(folder, tmp_path)
    (tmp_path / "cache/gone.tar").symlink_to("nowhere")
    assert (data.read(np.arange(97)).tokens == whole(folder)).all()


def _read_all(folder, tmp_path, results):
    data = remote(folder, tmp_path, limit=60_000)
    data.max_open = 1
    rng = np.random.default_rng(os.getpid())
    expected, good = whole(folder), True
    for _ in range(30):
        rows = rng.integers(0, 97, 5)
        good &= bool((data.read(rows).tokens == expected[rows]).all())
    results.put(good)


def test_processes_share_a_cache_that_is_too_small_for_them(folder, tmp_path):
    results = CLEAN.Queue()
    workers = [CLEAN.Process(target=_read_all, args=(folder, tmp_path, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [True] * 3
    for worker in workers:
        worker.join()


def test_loader_reads_through_the_cache_in_worker_processes(folder, tmp_path):
    plans = [DataPlan.of(d, seed=4) for d in (TokenDataset(folder, seq_len=16),)]
    plans.append(DataPlan.of(remote(folder, tmp_path), seed=4))
    tokens = []
    for plan, workers in zip(plans, (0, 2), strict=True):
        with TrainLoader(plan, BatchRamp(8), micro_batch=8, workers=workers) as loader:
            tokens.append(np.concatenate([next(loader)[0].tokens for _ in range(12)]))
    assert (tokens[0] == tokens[1]).all()


@pytest.mark.parametrize("listing", [True, False])
def test_shards_over_http(folder, tmp_path, listing, monkeypatch):
    """With worker processes, an answer that ends early, and then a missing and a short shard."""
    monkeypatch.setattr(cache, "_PAUSE_SECONDS", 0)
    copy = shutil.copytree(folder, tmp_path / "served")
    settings = CacheSettings(tmp_path / "cache", 10**9)
    plans = [DataPlan.of(TokenDataset(folder, seq_len=16), seed=4)]
    tokens = []
    with serve(copy, listing=listing) as (url, server):
        plans.append(DataPlan.of(TokenDataset(url, seq_len=16, cache=settings), seed=4))
        server.torn = 1
        for plan, workers in zip(plans, (0, 2), strict=True):
            with TrainLoader(plan, BatchRamp(8), micro_batch=8, workers=workers) as loader:
                tokens.append(np.concatenate([next(loader)[0].tokens for _ in range(12)]))
        assert (tokens[0] == tokens[1]).all() and server.torn == 0
        assert len(copies(tmp_path)) == len(SIZES)
        assert next((tmp_path / "cache").rglob("tokenizer.model")).read_bytes() == b"model"
        tar = sorted(copy.rglob("train/*.tar"))[1]
        tar.write_bytes(tar.read_bytes()[:-512])
        with pytest.raises(DataError, match=r"http://.*shard-00000001.tar.*[0-9] bytes, got"):
            TokenDataset(url, seq_len=16, cache=settings)
        tar.unlink()
        with pytest.raises(DataError, match=r"shard-00000001.tar.*no such file"):
            TokenDataset(url, seq_len=16, cache=settings)
    with pytest.raises(DataError, match=r"http://.*does not answer"):
        TokenDataset(url, seq_len=16, cache=settings)
