"""Which checkpoint of a run `--checkpoint` means."""

import math

import pytest
import torch

from pretrain.checkpoint import TensorSlice, save_checkpoint
from xlstm_io.checkpoint import manifest as manifest_module
from xlstm_io.checkpoint.choose import choose
from xlstm_io.checkpoint.evaluation import Evaluation, write_evaluation
from xlstm_io.errors import CheckpointError


def save(root, step, loss=None, measured=None):
    state = {"valid_loss": loss, "valid_step": step if measured is None else measured}
    part = TensorSlice("w", (2,), (0,), torch.ones(2))
    return save_checkpoint(root, [part], state, {}, step=step)


@pytest.fixture
def run(tmp_path):
    losses = {10: 3.0, 20: 2.0, 30: None, 40: 2.5}
    return tmp_path, {step: save(tmp_path, step, loss) for step, loss in losses.items()}


def test_the_newest_the_best_a_step_a_name_or_a_path(run):
    root, paths = run
    assert choose(root) == paths[40]
    assert choose(root, "best") == paths[20]
    assert choose(root, "30") == choose(root / "checkpoints", "00030") == paths[30]
    assert choose(root, paths[10].name) == choose("elsewhere", str(paths[10])) == paths[10]
    assert choose(paths[10]) == paths[10]


def test_a_loss_of_an_earlier_step_does_not_count_and_of_equals_the_newest_does(run):
    root, _ = run
    save(root, 50, 0.1, measured=45)
    newest = save(root, 60, 2.0)
    assert choose(root, "best") == newest


def test_what_is_not_there_is_one_message(run, tmp_path):
    root, paths = run
    with pytest.raises(CheckpointError, match=r"with that step .*25.*; steps: 10, 20, 30, 40"):
        choose(root, "25")
    with pytest.raises(CheckpointError, match="is one checkpoint; --checkpoint best chooses"):
        choose(paths[10], "best")
    with pytest.raises(CheckpointError, match="no such folder"):
        choose(root, "step-00000099-abcd")
    save(tmp_path / "other", 10)
    with pytest.raises(CheckpointError, match="whose validation loss was measured"):
        choose(tmp_path / "other", "best")


def test_only_what_is_chosen_is_looked_at_whole(run, monkeypatch):
    """A run of months has a hundred checkpoints, each with a file of every rank."""
    root, paths = run
    looked, real = [], manifest_module.check_sizes
    monkeypatch.setattr(
        manifest_module, "check_sizes", lambda path, *rest: looked.append(path) or real(path, *rest)
    )
    assert choose(root, "10") == paths[10] and looked == [paths[10]]
    looked.clear()
    assert choose(root, "best") == paths[20] and looked == [paths[20]]
    (paths[20] / "data-00000.safetensors").write_bytes(b"cut")
    assert choose(root, "best") == paths[40]
    with pytest.raises(CheckpointError, match=r"with that step .*20.*; steps: 10, 30, 40"):
        choose(root, "20")


def test_a_loss_beside_the_manifest_counts(run):
    root, paths = run
    write_evaluation(paths[30], Evaluation(30, 1.5))
    assert choose(root, "best") == paths[30]
    write_evaluation(paths[30], Evaluation(30, math.nan))
    assert choose(root, "best") == paths[20]
