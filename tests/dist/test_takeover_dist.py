"""A newer life takes a run over while the older one saves: all ranks of that one end alike."""

import threading
import time
from unittest import mock

import pytest

import pretrain.commands.run.train
from pretrain.config import config_from_dict
from pretrain.supervision import lease
from pretrain.supervision.lease import Lease
from pretrain.trainer import Trainer
from tests.dist.training_runs import tiny_run
from xlstm_io.checkpoint import writer
from xlstm_io.checkpoint.manifest import find_latest, step_folders
from xlstm_io.errors import Superseded

pytestmark = pytest.mark.dist

LIMIT_S = 20.0  # for what takes milliseconds


def train_and_be_taken_over(raw):
    """How a run ends whose first save waits until the ranks have looked at the lease.

    Rank 1 writes only then, so that all save threads have messages under way meanwhile.
    """
    looked = threading.Event()
    save, check, write = Trainer._save, Trainer._check_lease, writer.write_safetensors

    def save_and_lose_the_lease(trainer, metrics):
        save(trainer, metrics)
        if trainer.lease is not None:
            Lease.take(trainer.dir, take_over=True)
            deadline = time.monotonic() + LIMIT_S
            while not trainer.lease.lost and time.monotonic() < deadline:
                time.sleep(0.01)

    def look(trainer):
        try:
            check(trainer)
        finally:
            looked.set()

    def write_late(path, *rest):
        if path.name == "data-00001.safetensors":
            assert looked.wait(LIMIT_S), "the ranks do not agree about the lease"
        return write(path, *rest)

    with (
        mock.patch.object(lease, "RENEW_S", 0.01),
        mock.patch.object(Trainer, "_save", save_and_lose_the_lease),
        mock.patch.object(Trainer, "_check_lease", look),
        mock.patch.object(writer, "write_safetensors", write_late),
        pytest.raises(Superseded) as caught,
    ):
        pretrain.commands.run.train.main(config_from_dict(raw))
    return str(caught.value)


def test_a_life_that_is_taken_over_while_it_saves_ends_on_all_ranks(pool, shards, tmp_path):
    first, second = pool(2, train_and_be_taken_over, tiny_run(tmp_path, shards))
    assert first == second and "life 2 (process" in first and "from life 1, which ends" in first
    checkpoints = tmp_path / "checkpoints"
    assert find_latest(checkpoints) is None and len(step_folders(checkpoints)) == 1
