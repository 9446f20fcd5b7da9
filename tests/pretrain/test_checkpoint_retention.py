"""Which checkpoints stay, and what happens to the others."""

import math
import os
import shutil
from pathlib import Path

import pytest

from pretrain.checkpoint import (
    CheckpointSaver,
    Retention,
    find_latest,
    save_checkpoint,
)
from pretrain.checkpoint import retention as retention_module
from pretrain.checkpoint.retention import DEAD_AFTER_S, Saved, to_delete
from tests.pretrain.checkpoints import first_value, slices_of, steps_in
from xlstm_io.checkpoint.evaluation import Evaluation, write_evaluation
from xlstm_io.checkpoint.lives import record_start
from xlstm_io.checkpoint.manifest import read_manifest, step_of_folder
from xlstm_io.errors import Superseded
from xlstm_io.storage import files


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (Retention(), [1, 2, 3, 4, 5, 6]),
        (Retention(keep=2), [5, 6]),
        (Retention(keep=1, keep_every=2), [2, 4, 6]),
        (Retention(keep=1, keep_best=2), [2, 3, 6]),
        (Retention(keep=2, keep_every=4, keep_best=1), [3, 4, 5, 6]),
    ],
)
def test_which_checkpoints_stay(retention, left):
    losses = {1: 3.0, 2: 2.0, 3: 1.0, 4: math.inf, 5: 2.5, 6: 2.2}
    saved = [Saved(Path(str(step)), step, 0.0, loss) for step, loss in losses.items()]
    gone = {s.step for s in to_delete(saved, retention)}
    assert sorted(set(losses) - gone) == left


def test_the_best_is_judged_by_the_loss_of_its_own_step(tmp_path):
    """Version 0.1.0 had the loss in the state, with the step it was measured at."""
    retention = Retention(keep=1, keep_best=1)
    with CheckpointSaver(tmp_path, retention=retention) as saver:
        for step, loss, measured in ((1, 2.0, 1), (2, 1.0, 2), (3, 1.0, 2), (4, 3.0, 4)):
            state = {"valid_loss": loss, "valid_step": measured}
            saver.save(slices_of(step), state, {}, step=step)
    assert steps_in(tmp_path) == [2, 4]


def test_what_changes_between_two_saves_is_seen(tmp_path):
    """Nothing that was read of a checkpoint counts once its folder is another."""

    def path_of(step):
        return next(path for path in tmp_path.iterdir() if step_of_folder(path) == step)

    with CheckpointSaver(tmp_path, retention=Retention(keep=2, keep_best=1)) as saver:

        def save(step):
            saver.save(slices_of(step), {}, {}, step=step)
            saver.wait()
            return steps_in(tmp_path)

        save(1), save(2)
        assert save(3) == [2, 3]
        (path_of(3) / "data-00000.safetensors").write_bytes(b"cut")
        assert save(4) == [2, 3, 4], "3 takes no place, and is left for a person"
        write_evaluation(path_of(2), Evaluation(2, 1.0))
        assert save(5) == [2, 3, 4, 5], "2 is the best"
        shutil.rmtree(path_of(2))
        place, state = path_of(4), {"valid_loss": 0.5, "valid_step": 4}
        other = save_checkpoint(tmp_path.with_name("other"), slices_of(1), state, {}, step=4)
        shutil.rmtree(place)
        other.rename(place)
        assert save(6) == [3, 4, 5, 6], "what took the name of 4 is the best"


def test_a_life_that_is_superseded_after_its_manifest_deletes_and_measures_nothing(tmp_path):
    looks = []

    def fence():
        looks.append(None)
        if len(looks) > 3:  # before a manifest and before retention, of two saves
            raise Superseded("a newer life has the run")

    retention = Retention(keep=1)
    with CheckpointSaver(tmp_path, retention=retention, asynchronous=False, fence=fence) as saver:
        for step in (1, 2):
            saver.save(slices_of(step), {}, {}, step=step)
        saver.record(Evaluation(2, 1.0))
    assert len(looks) == 5 and steps_in(tmp_path) == [1, 2]
    assert not list(tmp_path.glob("*/evaluation.json"))


def test_what_a_superseded_life_left_takes_no_place(tmp_path):
    """It has the highest step, and would be the newest of two."""
    with CheckpointSaver(tmp_path, retention=Retention(keep=2)) as saver:
        saver.save(slices_of(9), {"life": 1}, {}, step=9)
        saver.wait()
        record_start(tmp_path, 2, 0)
        for step in (1, 2, 3):
            saver.save(slices_of(step), {"life": 2}, {}, step=step)
    assert sorted(step_of_folder(path) for path in tmp_path.glob("step-*")) == [2, 3, 9]


def test_a_step_whose_loss_is_never_measured_is_not_kept_for_good(tmp_path):
    retention = Retention(keep=1, keep_best=1)
    with CheckpointSaver(tmp_path, retention=retention) as saver:
        for step, loss in ((1, 2.0), (2, 3.0), (3, 1.0)):
            saver.save(slices_of(step), {}, {}, step=step)
            saver.record(Evaluation(step, loss))
        saver.save(slices_of(4), {}, {}, step=4)
        saver.wait()
        assert steps_in(tmp_path) == [3, 4], "the newest may be measured yet"
        saver.save(slices_of(5), {}, {}, step=5)
        saver.record(Evaluation(5, 0.5))
        saver.wait()
        assert steps_in(tmp_path) == [5], "it is the best now"
        saver.save(slices_of(6), {}, {}, step=6)
        saver.save(slices_of(7), {}, {}, step=7)
        saver.wait()
        assert steps_in(tmp_path) == [5, 7]


def test_a_checkpoint_that_somebody_removed_is_missed_at_the_next_save(tmp_path, caplog):
    with CheckpointSaver(tmp_path / "checkpoints") as saver:
        saver.save(slices_of(1), {}, {}, step=1)
        saver.save(slices_of(2), {}, {}, step=2)
        saver.wait()
        assert "is gone" not in caplog.text
        lost = saver.last_good
        shutil.rmtree(tmp_path / "checkpoints")
        saver.save(slices_of(3), {}, {}, step=3)
        saver.wait()
    assert f"the checkpoint {lost} is gone: somebody has removed or moved it" in caplog.text
    assert first_value(find_latest(tmp_path)) == 3.0


def test_dead_attempts_go_and_living_ones_stay(tmp_path):
    dead, living, damaged = (tmp_path / f"step-0000000{n}-x" for n in (1, 2, 3))
    for folder in (dead, living, damaged):
        folder.mkdir()
        (folder / "data-00000.safetensors").write_bytes(b"half")
    (damaged / "manifest.json").write_text("{")
    long_ago = os.stat(dead).st_mtime - DEAD_AFTER_S - 60
    for folder in (dead, damaged):
        for path in (*folder.iterdir(), folder):
            os.utime(path, (long_ago, long_ago))
    os.utime(living, (long_ago, long_ago))  # but its file is young
    with CheckpointSaver(tmp_path, retention=Retention(keep=1)) as saver:
        saver.save(slices_of(1), {}, {}, step=4)
    assert not dead.exists() and living.exists() and damaged.exists()


def test_a_checkpoint_that_was_moved_to_an_archive_is_not_deleted_through_its_link(tmp_path):
    root, archive = tmp_path / "checkpoints", tmp_path / "archive"
    with CheckpointSaver(root, retention=Retention(keep=1)) as saver:
        saver.save(slices_of(1), {}, {}, step=1)
        saver.wait()
        (path,) = root.iterdir()
        path.rename(archive)
        path.symlink_to(archive)
        saver.save(slices_of(2), {}, {}, step=2)
    assert steps_in(root) == [2] and not path.is_symlink()
    read_manifest(archive)


def test_storage_that_lists_late_fails_no_save(tmp_path, monkeypatch):
    """The manifest that was just written is not in the list yet, and some attempt is."""
    (tmp_path / "step-00000009-x").mkdir()

    def late(path):
        return {n: about for n, about in files(path).items() if n != "manifest.json"}

    monkeypatch.setattr(retention_module, "files", late)
    with CheckpointSaver(tmp_path, retention=Retention(keep=1)) as saver:
        for step in (1, 2):
            saver.save(slices_of(step), {}, {}, step=step)
            saver.wait()
            assert saver.take_finished() is not None
    assert steps_in(tmp_path) == [1, 2, 9]
