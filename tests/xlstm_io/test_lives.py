"""Checkpoints of a life that had been superseded are named and passed over."""

import pytest
import torch

from pretrain.checkpoint import (
    Candidates,
    CheckpointError,
    Retention,
    TensorSlice,
    save_checkpoint,
)
from pretrain.checkpoint.retention import apply_retention
from xlstm_io.checkpoint.lives import Lives, check_newest, record_start
from xlstm_io.checkpoint.manifest import find_latest
from xlstm_io.errors import Superseded


def save(root, life, step):
    """A checkpoint that a life wrote."""
    tensor = torch.full((2, 2), float(step))
    slices = [TensorSlice("w", (2, 2), (0, 0), tensor)]
    return save_checkpoint(root, slices, {"life": life} if life else {}, {}, step=step)


def test_a_life_is_superseded_beyond_the_step_where_a_later_one_began(tmp_path):
    for life, start in ((1, 0), (2, 10), (4, 30)):
        record_start(tmp_path, life, start)
    lives = Lives(tmp_path)
    assert lives.superseded_by(1, 10) is None
    assert lives.superseded_by(1, 11) == 2
    assert lives.superseded_by(2, 30) is None
    assert lives.superseded_by(3, 31) == 4
    assert lives.superseded_by(4, 10**9) is None
    assert lives.superseded_by(0, 5) == 1


def test_what_was_saved_before_there_were_lives_is_never_superseded(tmp_path):
    """Until a life goes on from an earlier step, as it does for any other checkpoint."""
    newest = save(tmp_path, None, 7)
    assert find_latest(tmp_path) == newest
    record_start(tmp_path / "checkpoints", 1, 7)
    assert find_latest(tmp_path) == newest


@pytest.mark.parametrize("url", [False, True], ids=["local", "memory"])
def test_the_newest_checkpoint_of_the_newer_life_is_taken(tmp_path, caplog, url):
    root = f"memory://lives{tmp_path}" if url else tmp_path
    from xlstm_io.storage import location

    folder = location(root) / "checkpoints"
    record_start(folder, 1, 0)
    save(root, 1, 10)
    record_start(folder, 2, 10)
    good = save(root, 2, 12)
    late = save(root, 1, 15)  # the old life was only standing still
    assert next(iter(Candidates(folder))) == good
    assert find_latest(root) == good
    assert f"{late} of life 1 does not count: life 2 of the run went on" in caplog.text


@pytest.mark.parametrize("url", [False, True], ids=["local", "memory"])
def test_a_record_is_never_replaced_and_the_newest_one_is_right(tmp_path, url):
    from xlstm_io.storage import location

    folder = location(f"memory://records{tmp_path}" if url else tmp_path)
    record_start(folder, 3, 40, run=tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"000003\.json is there already"):
        record_start(folder, 3, 0)
    assert Lives(folder).superseded_by(2, 41) == 3 and Lives(folder).superseded_by(2, 40) is None
    check_newest(folder, 3)
    record_start(folder, 4, 0, run=tmp_path / "b")
    assert Lives(folder).newest == 4 and Lives(folder).run == tmp_path / "b"
    with pytest.raises(Superseded, match=rf"life 4 of run.dir={tmp_path / 'b'} has taken over"):
        check_newest(folder, 3)


def test_a_run_never_starts_anew_because_all_checkpoints_are_superseded(tmp_path):
    save(tmp_path, 1, 10)
    record_start(tmp_path / "checkpoints", 2, 0)
    with pytest.raises(CheckpointError, match="none of the checkpoints there is sound"):
        Candidates(tmp_path / "checkpoints")


@pytest.mark.parametrize("text", ["", "{}", '{"start_step": "x"}', "[1]"])
def test_a_damaged_record_is_one_error_with_its_repair_and_not_one_of_each_checkpoint(
    tmp_path, caplog, text
):
    saved = [save(tmp_path, 1, step) for step in (5, 10)]
    folder = tmp_path / "checkpoints"
    record_start(folder, 2, 10)
    record = folder / "lives" / "000002.json"
    record.write_text(text)
    with pytest.raises(CheckpointError) as error:
        Candidates(folder)
    said = str(error.value)
    assert said.count(f"{record} is damaged and does not say where life 2 began") == 1
    assert 'write {"start_step": STEP} into it' in said and "step-0000" not in said
    with pytest.raises(CheckpointError, match="is damaged and does not say where life 2 began"):
        find_latest(tmp_path)

    apply_retention(folder, Retention(keep=1), saved[1])
    assert all(path.exists() for path in saved) and f"clean up in {folder}: {record}" in caplog.text

    record.write_text('{"start_step": 10}')
    assert list(Candidates(folder)) == [*reversed(saved)]
