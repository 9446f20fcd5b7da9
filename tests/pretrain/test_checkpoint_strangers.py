"""A stranger's checkpoint is data: whatever its files hold, loading runs no code and ends in words.

And remote storage: everything through an object store without rename.
"""

import json
import os
import pickle
import struct

import pytest
import torch

from pretrain.checkpoint import (
    Candidates,
    CheckpointDamagedError,
    CheckpointError,
    CheckpointSaver,
    Retention,
    TensorSlice,
    find_latest,
    load_checkpoint,
    read_manifest,
    resolve,
    save_checkpoint,
)
from pretrain.checkpoint.retention import apply_retention
from pretrain.commands.after_run.show import show
from tests import fake_object_store
from xlstm_io.checkpoint import reader
from xlstm_io.checkpoint.manifest import manifest_checksum, step_of_folder
from xlstm_io.checkpoint.reader import CheckpointReader
from xlstm_io.checkpoint.safetensors_stream import hash_file
from xlstm_io.storage import RemotePath, location

SHAPE = (40, 8)


def value():
    return torch.arange(320.0).view(SHAPE)


def wanted():
    return TensorSlice("w", SHAPE, (0, 0), torch.zeros(SHAPE))


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path, [TensorSlice("w", SHAPE, (0, 0), value())], {}, {}, step=1)


def sign(path, **changes):
    """Make the manifest fit what lies there, as a stranger with our code would."""
    body = json.loads((path / "manifest.json").read_text()) | changes
    for name in body["files"]:
        if (path / name).is_file():
            written = hash_file(path / name)
            body["files"][name] = {"size": written.size, "xxh3": written.xxh3}
    body["checksum"] = manifest_checksum(body)
    (path / "manifest.json").write_text(json.dumps(body))


def rewrite_rows(path, change):
    meta = json.loads((path / "metadata.json").read_text())
    change(meta["tensors"]["w"])
    (path / "metadata.json").write_text(json.dumps(meta))
    sign(path)


DATA = "data-00000.safetensors"


@pytest.mark.parametrize("name", ["manifest.json", "metadata.json", DATA])
@pytest.mark.parametrize("signed", [False, True])
def test_a_pickle_in_place_of_any_file_is_never_loaded(checkpoint, tmp_path, name, signed):
    marker = tmp_path / "executed"
    (checkpoint / name).write_bytes(pickle.dumps(Bomb(marker)).ljust(2000, b"\0"))
    if signed and name != "manifest.json":
        sign(checkpoint)
    with pytest.raises(CheckpointDamagedError):
        load_checkpoint(checkpoint, [wanted()])
    assert not marker.exists()
    pickle.loads((checkpoint / name).read_bytes()).close()  # it would have worked
    assert marker.exists()


def test_headers_of_data_files_are_not_even_parsed(checkpoint):
    """A header of 2^63 bytes or of broken JSON does not matter: stored slices have hashes."""
    data = bytearray((checkpoint / DATA).read_bytes())
    data[:8] = struct.pack("<Q", 1 << 63)
    data[8:20] = b"{" * 12
    (checkpoint / DATA).write_bytes(data)
    part = wanted()
    load_checkpoint(checkpoint, [part])
    assert torch.equal(part.tensor, value())


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "1" * 10_000, "NaN", "null", '{"format": 3}', "\x00", "[]"],
    ids=["deep list", "deep object", "long number", "nan", "null", "type", "nul", "list"],
)
@pytest.mark.parametrize("name", ["manifest.json", "metadata.json"])
def test_json_bombs_are_refused(checkpoint, name, text):
    (checkpoint / name).write_text(text)
    if name == "metadata.json":
        sign(checkpoint)
    with pytest.raises(CheckpointDamagedError):
        load_checkpoint(checkpoint, [wanted()])


def test_a_manifest_of_terabytes_is_not_read(checkpoint):
    os.truncate(checkpoint / "manifest.json", 1 << 40)  # sparse
    with pytest.raises(CheckpointError, match="are not read"):
        load_checkpoint(checkpoint, [wanted()])


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", "a\x00b", "~"])
def test_paths_out_of_the_folder_are_refused(checkpoint, name):
    body = json.loads((checkpoint / "manifest.json").read_text())
    sign(checkpoint, files=body["files"] | {name: {"size": 1, "xxh3": "0"}})
    with pytest.raises(CheckpointDamagedError, match="names a file outside"):
        read_manifest(checkpoint)
    sign(checkpoint, files=body["files"])
    rewrite_rows(checkpoint, lambda rows: rows[0].__setitem__(2, name))
    with pytest.raises(CheckpointDamagedError, match="does not describe"):
        load_checkpoint(checkpoint, [wanted()])


@pytest.mark.parametrize("name", ["manifest.json", "metadata.json", DATA])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_links_and_devices_in_place_of_files_are_refused(checkpoint, tmp_path, name, kind):
    path = checkpoint / name
    path.rename(tmp_path / "real")
    if kind == "link":
        path.symlink_to(tmp_path / "real")
    elif kind == "pipe":
        os.mkfifo(path)  # reading it would never end
    else:
        path.mkdir()
    with pytest.raises(CheckpointError, match="not a plain file"):
        load_checkpoint(checkpoint, [wanted()])


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[0].__setitem__(3, -1),
        lambda rows: rows[0].__setitem__(3, 1 << 40),
        lambda rows: rows[0].__setitem__(3, "here"),
        lambda rows: rows[0].__setitem__(1, [1 << 40, 1 << 40]),
        lambda rows: rows[0].__setitem__(1, [-40, -8]),
        lambda rows: rows[0].__setitem__(1, [40.0, 8]),
        lambda rows: rows[0].__setitem__(1, [True, 8]),
        lambda rows: rows[0].__setitem__(0, [0] * 1000),
        lambda rows: rows.clear(),
        lambda rows: rows.append(rows[0]),
        lambda rows: rows.append(["x"]),
    ],
)
def test_false_places_of_stored_slices_are_refused(checkpoint, change):
    rewrite_rows(checkpoint, change)
    with pytest.raises(CheckpointDamagedError, match="does not describe the tensors"):
        load_checkpoint(checkpoint, [wanted()])


def test_a_small_file_cannot_claim_a_huge_tensor(checkpoint):
    """The same bytes for every stored slice would make terabytes of memory out of a kilobyte."""
    body = json.loads((checkpoint / "manifest.json").read_text())
    rows = [[[r, 0], [1, 8], DATA, 0, "0"] for r in range(1000)]
    (checkpoint / "metadata.json").write_text(json.dumps({"tensors": {"w": rows}}))
    sign(checkpoint, tensors={"w": body["tensors"]["w"] | {"shape": [1000, 8]}})
    with pytest.raises(CheckpointDamagedError, match="too small for what it holds"):
        load_checkpoint(checkpoint, [TensorSlice("w", (1000, 8), (0, 0), torch.zeros(1000, 8))])


@pytest.mark.parametrize("offset", [0, 700, -1])
def test_a_flipped_bit_in_what_is_read_is_found(checkpoint, offset):
    data = bytearray((checkpoint / DATA).read_bytes())
    start = data.index(value().numpy().tobytes())
    data[start + offset if offset >= 0 else -1] ^= 16
    (checkpoint / DATA).write_bytes(data)
    assert find_latest(checkpoint.parent) == checkpoint, "sizes and manifest are right"
    with pytest.raises(CheckpointDamagedError, match=r"w at \[0, 0\] does not match its hash"):
        load_checkpoint(checkpoint, [TensorSlice("w", SHAPE, (3, 0), torch.zeros(2, 8))])


def test_a_run_never_starts_anew_beside_broken_checkpoints(checkpoint):
    folder = checkpoint.parent
    os.truncate(checkpoint / DATA, 100)
    with pytest.raises(
        CheckpointError, match=r"none of the checkpoints there is sound(?s:.*)100 bytes"
    ):
        Candidates(folder)
    (checkpoint / "manifest.json").unlink()  # an attempt that never was one
    assert list(Candidates(folder)) == []


@pytest.fixture
def store(tmp_path):
    fake_object_store.register()
    return f"objects://{tmp_path}/bucket/run"


def test_a_checkpoint_in_an_object_store(store):
    part = TensorSlice("w", SHAPE, (0, 0), value())
    with CheckpointSaver(store, retention=Retention(keep=2)) as saver:
        for step in (1, 2, 3):
            saver.save([part], {"tokens": step}, {}, step=step)
    latest = find_latest(store)
    assert isinstance(latest, RemotePath) and str(latest).startswith(f"{store}/step-00000003-")
    assert resolve(store) == resolve(str(latest)) == latest
    found = list(Candidates(store))
    assert found[0] == latest and len(found) == 2
    target = wanted()
    assert load_checkpoint(latest, [target]).state == {"tokens": 3}
    assert torch.equal(target.tensor, value())
    assert "320 in 1 tensor" in show(store) and str(latest) in show(store)


def test_only_the_ranges_that_are_needed_are_downloaded(store):
    big = torch.randn(4096, 4096)  # 64 MiB in stored slices of 16
    small = torch.randn(64, 64)
    slices = [
        TensorSlice(n, tuple(t.shape), (0, 0), t) for n, t in (("big", big), ("small", small))
    ]
    path = save_checkpoint(store, slices, {}, {}, step=1)
    fake_object_store.ObjectStore.bytes_read = 0
    load_checkpoint(path, [TensorSlice("small", (64, 64), (0, 0), torch.zeros(64, 64))])
    assert fake_object_store.ObjectStore.bytes_read < 50_000
    rows = torch.zeros(10, 4096)
    load_checkpoint(path, [TensorSlice("big", (4096, 4096), (1020, 0), rows)])  # in two of them
    assert torch.equal(rows, big[1020:1030])
    assert fake_object_store.ObjectStore.bytes_read < 33 << 20


def requests(act, *args, **kwargs):
    before = fake_object_store.ObjectStore.requests
    act(*args, **kwargs)
    return fake_object_store.ObjectStore.requests - before


def test_saves_and_starts_ask_no_more_for_many_files_and_many_checkpoints(store):
    few, saves, starts = [TensorSlice("w", SHAPE, (0, 0), value())], [], []
    for step in range(1, 7):
        files = {f"file-{number}": b"{}" for number in range(10 * step)}
        saves.append(requests(save_checkpoint, store, few, {}, {}, step=step, files=files))
        starts.append(requests(Candidates, store))
    assert len(set(saves)) == len(set(starts)) == 1 and max(saves + starts) < 10
    path = find_latest(store)
    (path / "file-3").fs.rm_file((path / "file-3").key)
    found = []
    assert requests(lambda: found.extend(Candidates(store))) < 6 * starts[0]
    assert [step_of_folder(one) for one in found] == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("retention", [Retention(keep=1, keep_every=2), Retention()], ids=str)
def test_retention_asks_nothing_about_what_stays_for_ever(store, retention):
    few, known = [TensorSlice("w", SHAPE, (0, 0), value())], {}
    files = {f"file-{number}": b"{}" for number in range(100)}
    paths = []

    def save_and_retain(step):
        paths.append(save_checkpoint(store, few, {}, {}, step=step, files=files))
        return requests(apply_retention, paths[-1].parent, retention, paths[-1], known=known)

    asked = [save_and_retain(step) for step in range(1, 13)]
    assert asked[5::2] == [asked[3]] * 4 and asked[6::2] == [asked[4]] * 3, "as many as ever"
    assert max(asked) < 30
    left = paths if retention.keep is None else paths[1::2]
    assert [*Candidates(store)] == left[::-1] and known.keys() == {*left}


def test_a_failing_store_is_one_message(store, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise RuntimeError("SlowDown: please reduce your request rate")

    saver = CheckpointSaver(store)
    part = TensorSlice("w", SHAPE, (0, 0), value())
    saver.save([part], {}, {}, step=1)
    saver.wait()
    monkeypatch.setattr(fake_object_store.ObjectStore, "pipe_file", refuse)
    saver.save([part], {}, {}, step=2)
    with pytest.raises(CheckpointError, match=r"RuntimeError: SlowDown.*last good checkpoint is"):
        saver.wait()
    monkeypatch.undo()
    assert [str(p) for p in Candidates(store)] == [str(saver.last_good)]


def test_a_store_whose_package_is_missing_is_one_message():
    with pytest.raises(CheckpointError, match=r"nosuch://bucket/x cannot be read"):
        resolve("nosuch://bucket/x")


def test_a_url_is_remote_and_a_path_is_not():
    assert isinstance(location("s3://a/b"), RemotePath)
    assert str(location("file:///a/b")) == "/a/b" and str(location("a/b")) == "a/b"
    path = RemotePath("s3://a/b/c")
    assert (path.name, str(path.parent), str(path / "d")) == ("c", "s3://a/b", "s3://a/b/c/d")


def test_slices_whose_comparison_takes_days_are_refused(checkpoint, monkeypatch):
    """A grid of single elements: nothing overlaps, and each is compared with all beside it."""
    data = bytearray((checkpoint / DATA).read_bytes())
    begin = len(data) - 4 * SHAPE[0] * SHAPE[1]

    def grid(rows):
        rows[:] = [
            [[i, j], [1, 1], DATA, begin + 4 * (i * SHAPE[1] + j), "0" * 16]
            for i in range(SHAPE[0])
            for j in range(SHAPE[1])
        ]

    rewrite_rows(checkpoint, grid)
    CheckpointReader(checkpoint)
    monkeypatch.setattr(reader, "MOST_COMPARED", 500)
    with pytest.raises(CheckpointDamagedError, match="too many of its slices lie side by side"):
        CheckpointReader(checkpoint)
