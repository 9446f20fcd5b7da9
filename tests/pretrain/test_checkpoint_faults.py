"""One strange or unreadable step in the folder does not keep a run from its other checkpoints."""

import errno
import json
import os

import pytest

from pretrain.checkpoint import (
    Candidates,
    CheckpointDamagedError,
    CheckpointError,
    CheckpointSaver,
    Ranks,
    Retention,
    find_latest,
    load_checkpoint,
    save_checkpoint,
)
from tests.pretrain.checkpoints import slices_of, steps_in
from xlstm_io import storage
from xlstm_io.checkpoint import manifest as manifest_module
from xlstm_io.checkpoint.manifest import manifest_checksum, resolve


def saved(folder, *steps):
    return [save_checkpoint(folder, slices_of(step), {}, {}, step=step) for step in steps]


def of_another_version(path):
    body = json.loads((path / "manifest.json").read_text()) | {"format_version": 9}
    body["checksum"] = manifest_checksum(body)
    (path / "manifest.json").write_text(json.dumps(body))


def test_saving_goes_on_beside_a_step_of_another_format_version(tmp_path, caplog):
    first, second = saved(tmp_path, 1, 2)
    of_another_version(second)
    folder = tmp_path / "checkpoints"
    with CheckpointSaver(folder, retention=Retention(keep=1)) as saver:
        for step in (3, 4):
            saver.save(slices_of(step), {}, {}, step=step)
    assert steps_in(folder) == [2, 4], "the other program's is left to it, and takes no place"
    assert not first.exists()
    assert list(Candidates(folder)) == [find_latest(tmp_path)]
    assert "checkpoint format version 9, this program reads version 2" in caplog.text


class OneOfMany(Ranks):
    """A rank whose others are not here."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_alone_looks_at_the_files_of_all(tmp_path, monkeypatch, rank):
    """1,024 ranks that each look at 1,024 files ask a file system a million times at once."""
    (path,) = saved(tmp_path, 1)
    sizes, real = [], manifest_module.check_sizes
    monkeypatch.setattr(manifest_module, "check_sizes", lambda *a: sizes.append(a) or real(*a))
    slices = slices_of(0)
    load_checkpoint(path, slices, ranks=OneOfMany(rank))
    assert len(sizes) == (rank == 0)
    assert all((a.tensor == b.tensor).all() for a, b in zip(slices, slices_of(1), strict=True))


@pytest.fixture
def unreadable(monkeypatch):
    """Makes reading of files below a folder an error, as the tests may run as root."""

    def make(folder, number):
        real_file, real_range = storage.read_file, storage.RangeReader.read_into

        def fails(path):
            if str(path).startswith(str(folder)):
                raise OSError(number, os.strerror(number), str(path))

        def read_file(path, limit, **options):
            fails(path)
            return real_file(path, limit, **options)

        def read_into(self, path, begin, buffer):
            fails(path)
            return real_range(self, path, begin, buffer)

        monkeypatch.setattr(manifest_module, "read_file", read_file)
        monkeypatch.setattr(storage.RangeReader, "read_into", read_into)

    return make


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_an_unreadable_newest_step_gives_way_to_an_older_one(tmp_path, unreadable, number, caplog):
    first, second = saved(tmp_path, 1, 2)
    unreadable(second, number)
    assert list(Candidates(tmp_path)) == [first]
    assert resolve(tmp_path) == find_latest(tmp_path) == first
    assert f"{second} cannot be read" in caplog.text
    with CheckpointSaver(tmp_path / "checkpoints", retention=Retention(keep=1)) as saver:
        saver.save(slices_of(3), {}, {}, step=3)
    assert steps_in(tmp_path / "checkpoints") == [2, 3], "what cannot be read stays"


def test_when_none_can_be_read_nothing_starts_anew(tmp_path, unreadable):
    saved(tmp_path, 1, 2)
    unreadable(tmp_path, errno.EIO)
    with pytest.raises(CheckpointError, match="move them away to start anew"):
        Candidates(tmp_path)


def test_storage_that_does_not_answer_ends_the_search(tmp_path, unreadable):
    """Whoever waits finds the newest again, and nothing is lost."""
    _, second = saved(tmp_path, 1, 2)
    unreadable(second, errno.ESTALE)
    with pytest.raises(CheckpointError, match="Stale file handle"):
        Candidates(tmp_path)


def test_an_unreadable_data_file_counts_as_damaged(tmp_path, unreadable):
    (path,) = saved(tmp_path, 1)
    unreadable(path / "data-00000.safetensors", errno.EIO)
    with pytest.raises(CheckpointDamagedError, match="cannot be read"):
        load_checkpoint(path, slices_of(0))


def test_the_last_checkpoint_with_a_finite_loss_is_never_removed(tmp_path):
    with CheckpointSaver(tmp_path, retention=Retention(keep=1)) as saver:
        for step, loss in ((1, 2.0), (2, 2.5), (3, None), (4, None), (5, None)):
            saver.save(slices_of(step), {"loss": loss}, {}, step=step)
    assert steps_in(tmp_path) == [2, 5]
