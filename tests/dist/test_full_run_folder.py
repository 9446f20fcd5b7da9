"""A run whose folder is full saves first, where its checkpoints lie on another disk."""

import errno
import os

import pytest

import pretrain.commands.run.train
from pretrain.checkpoint import find_latest
from pretrain.config import config_from_dict
from pretrain.watching.metrics import MetricLogger, read_metrics
from tests.dist.training_runs import tiny_run
from xlstm_io.checkpoint.manifest import step_of_folder
from xlstm_io.errors import MachineFailed

pytestmark = pytest.mark.dist


def train_on_a_full_disk(raw, step):
    """The message of the end of a run whose disk takes no record from a step on."""
    write = MetricLogger._write

    def full(self, at, values):
        if at >= step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, at, values)

    MetricLogger._write = full
    try:
        return pretrain.commands.run.train.main(config_from_dict(raw))
    except MachineFailed as error:
        return str(error)
    finally:
        MetricLogger._write = write


def train(raw):
    return pretrain.commands.run.train.main(config_from_dict(raw))


def test_a_full_run_folder_ends_the_run_after_a_save(pool, shards, tmp_path):
    raw = tiny_run(tmp_path / "run", shards, run__steps=10, checkpoint__interval=9)
    raw["checkpoint"]["dir"] = str(tmp_path / "other disk")
    for message in pool(2, train_on_a_full_disk, raw, 4):
        assert "No space left on device; the run has saved" in str(message)
        assert "make room, and repeat the command" in message
    assert step_of_folder(find_latest(tmp_path / "other disk")) == 5
    assert pool(2, train, raw) == [0, 0]
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 6, 7, 8, 9, 10]
