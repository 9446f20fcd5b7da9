"""Checkpoints in one process: round trips, what is refused, what a broken one does."""

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint import (
    CheckpointError,
    TensorSlice,
    check_same_run,
    find_latest,
    load_checkpoint,
    read_manifest,
    resolve,
    save_checkpoint,
)
from pretrain.commands.after_run.show import show
from xlstm_io.checkpoint.manifest import manifest_checksum
from xlstm_io.checkpoint.reader import CheckpointReader, check_exact_cover
from xlstm_io.checkpoint.safetensors_stream import hash_file
from xlstm_io.errors import UserError

CONFIG = {"model": {"pattern": "MM", "hidden_size": 256, "num_heads": 4, "vocab_size": 512}}
STATE = {"step": 7, "tokens": 1234567, "rng": [1, 2, 3], "lr": 1e-3}


def whole(name, tensor):
    return TensorSlice(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor)


def tensors():
    g = torch.Generator().manual_seed(0)
    return {
        "embedding.word_embeddings.weight": torch.randn(48, 20, generator=g),
        "decoder.layers.0.mixer.q_proj.weight": torch.randn(12, 20, generator=g).bfloat16(),
        "decoder.layers.0.mixer.conv.weight": torch.randn(5, 3, 2, generator=g),
        "optimizer.state.exp_avg.decoder.layers.0.mixer.igate.bias": torch.randn(7, generator=g),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "count": torch.tensor([4, 5], dtype=torch.int64),
    }


def save(root, values=None, step=7, **kw):
    slices = [whole(n, t) for n, t in (values or tensors()).items()]
    return save_checkpoint(root, slices, STATE, CONFIG, step=step, **kw)


@pytest.mark.parametrize(
    "state", [{"life": 1 << 40}, {"curve": {"steps": 0, "turns": []}}, {"updates": -1}]
)
def test_a_manifest_that_no_reader_takes_is_not_written(tmp_path, state):
    sound = save(tmp_path, step=1)
    slices = [whole(n, t) for n, t in tensors().items()]
    with pytest.raises(CheckpointError, match="this is a bug of the program: report it"):
        save_checkpoint(tmp_path, slices, STATE | state, CONFIG, step=2)
    assert find_latest(tmp_path) == sound
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [sound.name]


def random_tiling(shape, rng, slices=1):
    """Cut a box into random boxes, recursively."""
    boxes = [((0,) * len(shape), tuple(shape))]
    for _ in range(slices):
        offset, size = boxes.pop(rng.randrange(len(boxes)))
        axis = rng.randrange(len(shape))
        if size[axis] < 2:
            boxes.append((offset, size))
            continue
        cut = rng.randrange(1, size[axis])
        first, second = list(size), list(size)
        first[axis], second[axis] = cut, size[axis] - cut
        moved = list(offset)
        moved[axis] += cut
        boxes += [(offset, tuple(first)), (tuple(moved), tuple(second))]
    return boxes


def view(tensor, offset, size):
    return tensor[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]


def test_round_trip_of_state_config_and_every_dtype(tmp_path):
    values = tensors()
    path = save(tmp_path, values)
    assert path.parent == tmp_path / "checkpoints" and path.name.startswith("step-00000007-")
    loaded = {n: torch.zeros_like(t) for n, t in values.items()}
    manifest = load_checkpoint(path, [whole(n, t) for n, t in loaded.items()])
    for name, value in values.items():
        assert torch.equal(loaded[name], value), name
    assert (manifest.step, manifest.state, manifest.config) == (7, STATE, CONFIG)
    assert manifest.versions["torch"] == torch.__version__


def test_any_tiling_loads_into_any_tiling(tmp_path):
    rng = random.Random(1)
    for number, shape in enumerate([(13, 9), (4, 5, 6), (31,), (2, 3, 4, 5)]):
        full = torch.randn(shape)
        saved = [
            TensorSlice("w", shape, o, view(full, o, s))
            for o, s in random_tiling(shape, rng, slices=12)
        ]
        path = save_checkpoint(tmp_path, saved, {}, {}, step=number)
        target = torch.zeros(shape)
        load_checkpoint(
            path,
            [
                TensorSlice("w", shape, o, view(target, o, s))
                for o, s in random_tiling(shape, rng, 12)
            ],
        )
        assert torch.equal(target, full)


def test_only_what_is_asked_for_is_loaded_and_floats_convert(tmp_path):
    values = tensors()
    path = save(tmp_path, values)
    name = "decoder.layers.0.mixer.q_proj.weight"
    out = torch.zeros(5, 20)
    load_checkpoint(path, [TensorSlice(name, (12, 20), (4, 0), out)])
    assert torch.equal(out, values[name][4:9].float())


def test_files_are_plain_safetensors_and_no_pickle(tmp_path):
    path = save(tmp_path)
    assert sorted(p.name for p in path.iterdir()) == [
        "data-00000.safetensors",
        "manifest.json",
        "metadata.json",
    ]
    loaded = load_file(path / "data-00000.safetensors")
    assert torch.equal(
        loaded["embedding.word_embeddings.weight@0,0"],
        tensors()["embedding.word_embeddings.weight"],
    )


@pytest.mark.parametrize(
    ("slices", "words"),
    [
        ([((0, 0), (4, 6))], None),
        ([((0, 0), (2, 6)), ((2, 0), (2, 6))], None),
        ([((0, 0), (2, 6)), ((2, 0), (1, 6))], "hold 18 of its 24"),
        ([((0, 0), (3, 6)), ((2, 0), (2, 6))], "overlaps"),
        # the volumes add up, yet one part is there twice and another is missing
        ([((0, 0), (2, 6)), ((0, 0), (2, 3)), ((2, 0), (2, 3))], "overlaps"),
        ([((0, 0), (4, 4)), ((0, 3), (4, 2))], "overlaps"),
    ],
)
def test_slices_must_hold_every_element_exactly_once(slices, words):
    slices = [(o, s, rank) for rank, (o, s) in enumerate(slices)]
    if words is None:
        check_exact_cover("w", (4, 6), slices)
    else:
        with pytest.raises(CheckpointError, match=words):
            check_exact_cover("w", (4, 6), slices)


def test_a_missing_slice_is_named_at_save_and_nothing_is_left(tmp_path):
    w = torch.randn(4, 6)
    with pytest.raises(CheckpointError, match=r"layers\.3\.w: the slices.*hold 12 of its 24"):
        save_checkpoint(
            tmp_path, [TensorSlice("layers.3.w", (4, 6), (0, 0), w[:2])], {}, {}, step=1
        )
    assert find_latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="two slices at"):
        save_checkpoint(tmp_path, [whole("w", w), whole("w", w)], {}, {}, step=1)
    with pytest.raises(CheckpointError, match="state to be saved is not JSON"):
        save_checkpoint(tmp_path, [whole("w", w)], {"rng": w}, {}, step=1)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_missing_or_misshaped_tensor_is_named_at_load(tmp_path):
    path = save(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not hold the tensor decoder\.layers\.9\.w"):
        load_checkpoint(path, [whole("decoder.layers.9.w", torch.zeros(3))])
    with pytest.raises(UserError, match=r"q_proj.weight: the checkpoint has shape \[12, 20\]"):
        load_checkpoint(path, [whole("decoder.layers.0.mixer.q_proj.weight", torch.zeros(20, 12))])
    with pytest.raises(CheckpointError, match=r"count: the checkpoint has torch.int64"):
        load_checkpoint(path, [whole("count", torch.zeros(2))])


def test_a_slice_outside_its_tensor_is_refused():
    with pytest.raises(ValueError, match="does not lie inside"):
        TensorSlice("w", (4, 4), (2, 0), torch.zeros(3, 4))


def test_latest_passes_over_broken_ones_and_names_them(tmp_path, caplog):
    old = save(tmp_path, step=10)
    newest = {kind: save(tmp_path, step=20 + n) for n, kind in enumerate(DAMAGES)}
    for kind, path in newest.items():
        DAMAGES[kind](path)
    before = {p: sorted(os.listdir(p)) for p in newest.values()}
    assert find_latest(tmp_path) == old
    for path in newest.values():
        assert str(path) in caplog.text
    assert before == {p: sorted(os.listdir(p)) for p in newest.values()}, "nothing is deleted"
    assert resolve(tmp_path) == resolve(tmp_path / "checkpoints") == resolve(old) == old
    for path in newest.values():
        with pytest.raises(CheckpointError):
            resolve(path)
        with pytest.raises(CheckpointError):
            load_checkpoint(path, [])


def _truncate(path: Path):
    data = next(path.glob("data-*"))
    os.truncate(data, data.stat().st_size - 1)


def _edit_manifest(path: Path, old: str, new: str):
    text = (path / "manifest.json").read_text()
    assert old in text
    (path / "manifest.json").write_text(text.replace(old, new, 1))


DAMAGES = {
    "no manifest": lambda p: (p / "manifest.json").unlink(),
    "empty manifest": lambda p: (p / "manifest.json").write_text(""),
    "torn manifest": lambda p: os.truncate(p / "manifest.json", 300),
    "not complete": lambda p: _edit_manifest(p, '"complete": true', '"complete": false'),
    "altered state": lambda p: _edit_manifest(p, "1234567", "1234568"),
    "torn data": _truncate,
    "no data": lambda p: next(p.glob("data-*")).unlink(),
    "a list": lambda p: (p / "manifest.json").write_text("[1]"),
}


def test_a_flipped_bit_is_found_by_its_hash(tmp_path, caplog):
    old, new = save(tmp_path, step=1), save(tmp_path, step=2)
    data = next(new.glob("data-*"))
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    assert find_latest(tmp_path) == new
    assert find_latest(tmp_path, verify=True) == old
    assert f"{data} does not match its hash" in caplog.text


def test_a_stranger_cannot_point_outside_or_lie_about_stored_slices(tmp_path):
    path = save(tmp_path)
    body = json.loads((path / "manifest.json").read_text())

    def rewrite(**changes):
        new = body | changes
        new["checksum"] = manifest_checksum(new)
        (path / "manifest.json").write_text(json.dumps(new))

    rewrite(files=body["files"] | {"../../secret": {"size": 1, "xxh3": "0"}})
    with pytest.raises(CheckpointError, match="names a file outside"):
        read_manifest(path)
    rewrite(format_version=99)
    with pytest.raises(CheckpointError, match="version 99"):
        read_manifest(path)
    # metadata that does not make up the tensor, with a hash that fits
    meta = json.loads((path / "metadata.json").read_text())
    meta["tensors"]["count"][0][1] = [1]
    (path / "metadata.json").write_text(json.dumps(meta))
    written = hash_file(path / "metadata.json")
    rewrite(files=body["files"] | {"metadata.json": {"size": written.size, "xxh3": written.xxh3}})
    with pytest.raises(CheckpointError, match="count: the slices"):
        load_checkpoint(path, [whole("scalar", torch.zeros((), dtype=torch.float64))])


def test_retention_keeps_the_newest_and_never_the_one_before_the_new_is_complete(
    tmp_path, monkeypatch
):
    first = save(tmp_path, step=1, keep=2)
    second = save(tmp_path, step=2, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr("xlstm_io.checkpoint.writer.write_safetensors", _no_space)
        with pytest.raises(CheckpointError, match=r"step 3 failed.*No space left on device"):
            save(tmp_path, step=3, keep=1)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {first.name, second.name}
    third = save(tmp_path, step=3, keep=2)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {second.name, third.name}
    # the run went back: what it saves now stays although higher steps exist
    again = save(tmp_path, step=1, keep=2)
    assert again.exists() and second.exists() and third.exists()
    with pytest.raises(CheckpointError, match="keep=0"):
        save(tmp_path, step=4, keep=0)


def _no_space(path, *_):
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_full_disk_at_every_flush_leaves_the_previous_one(tmp_path, monkeypatch):
    calls = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(fd), real(fd)))
    good = save(tmp_path, step=1)
    assert len(calls) == 6  # data, metadata, folder, manifest, folder, its parent
    for fail_at in range(len(calls)):
        left = iter(range(fail_at + 1))

        def failing(fd, left=left, fail_at=fail_at):
            if next(left) == fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises(CheckpointError, match="No space left"):
            save(tmp_path, step=2)
        assert find_latest(tmp_path) == good
        assert list((tmp_path / "checkpoints").iterdir()) == [good]


def test_attempts_of_the_same_step_are_ordered_by_time(tmp_path):
    paths = [save(tmp_path, step=5) for _ in range(4)]
    assert find_latest(tmp_path) == paths[-1]


def test_resolve_says_what_is_wrong(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        resolve(tmp_path)


def test_show_prints_what_a_checkpoint_holds(tmp_path):
    text = show(save(tmp_path).parent.parent)
    for words in ("1,234,567", "pattern=MM hidden_size=256", "bfloat16", "[12, 20]"):
        assert words in text
    assert "1,233 in 5 tensors" in text  # 48*20 + 12*20 + 30 + 1 + 2 weights
    assert "optimizer   1 tensors" in text


def test_reader_without_the_trainer(tmp_path):
    path = save(tmp_path)
    with CheckpointReader(path) as reader:
        for name, value in tensors().items():
            assert torch.equal(reader.read(name), value)


def test_another_model_is_refused_with_what_differs():
    saved = {
        "model": {"hidden_size": 256, "pattern": "MM|MM", "chunk_size": 64, "ffn": {"a": 1}},
        "run": {"seed": 1, "steps": 5},
    }
    same = {
        "model": {"hidden_size": 256, "pattern": "MMMM", "chunk_size": None, "ffn": {"a": 1}},
        "run": {"seed": 1, "steps": 500},
    }
    check_same_run(saved, same)
    check_same_run(saved, {**same, "model": same["model"] | {"tie_embeddings": False}})
    with pytest.raises(CheckpointError, match="tie_embeddings: checkpoint False, run True"):
        check_same_run(saved, {**same, "model": same["model"] | {"tie_embeddings": True}})
    other = {"model": saved["model"] | {"hidden_size": 128, "extra": 1}, "run": {"seed": 2}}
    with pytest.raises(CheckpointError) as caught:
        check_same_run(saved, other)
    text = str(caught.value)
    assert "model.hidden_size: checkpoint 256, run 128" in text
    assert "model.extra: checkpoint (none), run 1" in text
    assert "run.seed: checkpoint 1, run 2" in text


def test_memory_of_saving_and_loading_is_counted(tmp_path):
    """Peak memory above the state (2 tensors of 96 MB, 8 of 4 MB), in MB.

    Saving at once and loading hold a stored slice of 16 MB, saving in the background holds a copy.
    """
    code = f"""
import torch
from pretrain.checkpoint import CheckpointSaver, TensorSlice, load_checkpoint, save_checkpoint
torch.set_num_threads(1)
data = [torch.ones(4, 6 << 20).t() for _ in range(2)]  # not contiguous
data += [torch.ones(1024, 1024) for i in range(8)]
slices = [TensorSlice(f"w{{i}}", tuple(t.shape), (0, 0), t) for i, t in enumerate(data)]
def peak(function):
    open("/proc/self/clear_refs", "w").write("5")
    read = lambda key: int(open("/proc/self/status").read().split(key)[1].split()[0]) // 1024
    before = read("VmRSS:")
    value = function()
    print(read("VmHWM:") - before)
    return value
small = [slices[-1]]
load_checkpoint(save_checkpoint({str(tmp_path)!r}, small, {{}}, {{}}, step=1), small)  # warm up
path = peak(lambda: save_checkpoint({str(tmp_path)!r}, slices, {{}}, {{}}, step=2))
peak(lambda: load_checkpoint(path, slices))
saver = CheckpointSaver({str(tmp_path)!r} + "/b")
peak(lambda: (saver.save(slices, {{}}, {{}}, step=3), saver.wait()))
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    saving, loading, background = map(int, out.split())
    assert max(saving, loading) < 16 + 8 and background < 2 * 96 + 8 * 4 + 8, out
