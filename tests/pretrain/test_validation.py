"""A run saves before it evaluates: a stop or a kill in an evaluation loses nothing."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.loader.synthetic_shards import write_shards
from pretrain import cli, layout
from pretrain.data import ValidLoader, dataset, open_plan, open_valid
from pretrain.engines.base import LossSum
from pretrain.supervision.progress_file import read_progress
from pretrain.trainer import Trainer
from pretrain.validation import Validation
from pretrain.watching.metrics import MetricLogger, read_metrics
from tests.pretrain.run_files import config
from xlstm_io.checkpoint.evaluation import EVALUATION_NAME, read_evaluation
from xlstm_io.checkpoint.manifest import find_latest, parse_manifest, step_of_folder
from xlstm_io.errors import ExitCode
from xlstm_io.shards.manifest import load_manifest
from xlstm_io.shards.shard import ShardReader

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "0.1.0"
LOSSES = json.loads((GOLDEN / "losses.json").read_text())


class Killed(BaseException):
    """Stands for a SIGKILL: nothing of the run goes on after it."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run of six steps with its third checkpoint, as the working directory."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    return tmp_path / "golden" / "run"


@pytest.fixture
def batches(monkeypatch):
    """Counts the batches of evaluations; `batches.do[n]` is called before the n-th."""

    class Batches:
        seen, do = 0, {}

    real = ValidLoader.__iter__

    def iterate(self):
        for batch in real(self):
            Batches.seen += 1
            Batches.do.get(Batches.seen, lambda: None)()
            yield batch

    monkeypatch.setattr(ValidLoader, "__iter__", iterate)
    return Batches


def train(*options):
    layout.leave()
    try:
        return cli.run(["train", "run.yaml", "--data.global_batch", "8", *options])
    finally:
        layout.leave()


def newest(folder):
    path = find_latest(folder)
    return step_of_folder(path), read_evaluation(path, parse_manifest(path))


def losses(folder):
    return {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r}


def measured(folder):
    records = read_metrics(folder / "metrics.jsonl")
    return {r["step"]: r["valid_loss"] for r in records if "valid_loss" in r}


def check_complete(folder):
    """All steps, each once, with the losses of a run without a stop."""
    steps = [r["step"] for r in read_metrics(folder / "metrics.jsonl")]
    assert steps == [4, 5, 6]
    expected = {step: LOSSES[str(step)] for step in (4, 5, 6)}
    assert losses(folder) == pytest.approx(expected, abs=2e-6)


def test_a_stop_in_an_evaluation_is_obeyed_at_the_next_batch(folder, batches, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(MetricLogger, "evaluating", lambda self, *seen: shown.append(seen))
    batches.do[2] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    words = ["--evaluation.interval", "5", "--evaluation.max_batches", "2"]
    assert train(*words) == ExitCode.STOPPED
    assert batches.seen == 2, "the batch before which it was heard"
    assert "stopped after step 5" in capsys.readouterr().err
    # No checkpoint was due at this step, and one was saved for the stop.
    assert newest(folder) == (5, None) and read_progress(folder).status == "stopped"
    assert train(*words) == ExitCode.DONE
    check_complete(folder)
    assert shown[-4:] == [(n, 4) for n in range(4)]  # two micro-batches in a batch
    step, evaluation = newest(folder)
    assert step == 6 and sorted(measured(folder)) == [5, 6]
    assert evaluation.loss == measured(folder)[6] == summary(folder)["valid_loss"]


def test_a_kill_in_an_evaluation_loses_no_step(folder, batches):
    def kill():
        raise Killed

    batches.do[2] = kill
    words = ["--evaluation.interval", "4", "--checkpoint.interval", "4"]
    with pytest.raises(Killed):
        train(*words, "--checkpoint.no-asynchronous", "--evaluation.max_batches", "2")
    assert newest(folder) == (4, None)
    assert train(*words, "--evaluation.max_batches", "2") == ExitCode.DONE
    check_complete(folder)
    assert sorted(measured(folder)) == [4, 6]


def test_a_stop_in_the_last_evaluation_leaves_the_evaluation_to_the_next_life(folder, batches):
    batches.do[1] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert train() == ExitCode.STOPPED
    assert newest(folder) == (6, None) and not (folder / "summary.json").exists()
    assert train() == ExitCode.DONE
    check_complete(folder)
    assert newest(folder)[1].loss == summary(folder)["valid_loss"] == measured(folder)[6]
    seen = batches.seen
    assert train() == ExitCode.DONE and batches.seen == seen, "it is measured once"
    assert newest(folder)[1].loss == summary(folder)["valid_loss"]


def test_a_stop_in_the_evaluation_that_a_resume_begins_with(folder, batches):
    batches.do[1] = batches.do[2] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    words = ["--evaluation.interval", "4"]
    for _ in range(2):
        assert train(*words) == ExitCode.STOPPED
        assert newest(folder) == (4, None) and list(losses(folder)) == [4]
    assert train(*words) == ExitCode.DONE
    check_complete(folder)
    assert sorted(measured(folder)) == [4, 6]


def test_an_altered_evaluation_is_made_again(folder, batches):
    assert train("--run.steps", "4") == ExitCode.DONE
    before, seen = newest(folder)[1], batches.seen
    (find_latest(folder) / EVALUATION_NAME).write_text("{}")
    assert train("--run.steps", "4") == ExitCode.DONE
    assert newest(folder)[1] == before and batches.seen == 2 * seen


def damage(shards, block):
    """Flip a bit in a block of a folder's first validation shard."""
    manifest = load_manifest(shards)
    reader = ShardReader(manifest, manifest.shards("valid")[0])
    raw = bytearray(reader.path.read_bytes())
    raw[int(reader.index.off[block])] ^= 1
    reader.path.write_bytes(raw)


def told_by_labels(batches):
    """What an engine measures whose loss of a token is told by the label."""
    total = tokens = 0.0
    for batch in batches:
        total += (batch.labels % 7 * batch.loss_mask).sum().item()
        tokens += batch.loss_mask.sum().item()
    return LossSum(total, int(tokens))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_layout_measures_the_same_rows_and_none_that_is_damaged(tmp_path, caplog, ranks):
    write_shards(
        tmp_path, {"a": [4]}, seq_len=24, vocab_size=96, block_rows=4, valid_rows=12,
        document_tokens=9,
    )  # fmt: skip
    run = config(
        data__path=str(tmp_path), data__seq_len=24, data__global_batch=5, data__micro_batch=2,
        data__fill_batch=True, data__on_corrupt="quarantine", evaluation__max_batches=2,
    )  # fmt: skip
    (sound,) = open_valid(run.data).values()
    rows = sound.read(np.array([0, 1, 2, 3, 8, 9]))  # of ten, but for the second block
    expected = LossSum((rows.targets() % 7 * rows.masks()[0]).sum(), int(rows.masks()[0].sum()))
    damage(tmp_path, block=1)
    measured, met = [], []

    def measure(batches):
        measured.append(told_by_labels(batches))
        return measured[-1]

    for rank in reversed(range(ranks)):
        place = SimpleNamespace(
            dp_rank=rank, dp_size=ranks, is_main=rank == 0, any=bool,
            gather=lambda own: met.append(own) or met,
        )  # fmt: skip
        Validation(run, place, open_plan(run.data, 0)).measure(
            SimpleNamespace(evaluate=measure), 1, SimpleNamespace(requested=False),
            SimpleNamespace(moved=lambda phase, step: None),
        )  # fmt: skip
    assert sum(one.total for one in measured) == expected.total
    assert sum(one.tokens for one in measured) == expected.tokens
    (warning,) = caplog.messages
    assert "the validation loss is without 4 of 10 rows, which are damaged: " in warning
    assert "shard-00000000.tar: block 1 at byte" in warning and "restore the file" in warning


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_alone_looks_at_all_shards(tmp_path, monkeypatch, rank):
    write_shards(tmp_path, {"a": [4]}, seq_len=24, vocab_size=96, valid_rows=12)
    run = config(data__path=str(tmp_path), data__seq_len=24)
    place = SimpleNamespace(rank=rank, dp_rank=rank, dp_size=2, is_main=rank == 0)
    looked = []
    monkeypatch.setattr(dataset, "check_sizes", lambda root, entries: looked.append(len(entries)))
    with pytest.raises(AttributeError):  # the training data come before all that needs more
        Trainer(run, place, SimpleNamespace())
    assert bool(looked) == (rank == 0)


def test_a_run_goes_on_where_its_whole_validation_set_is_damaged(folder, caplog):
    damage(folder.parent / "shards", block=0)
    assert train("--data.on_corrupt", "quarantine", "--evaluation.interval", "4") == ExitCode.DONE
    check_complete(folder)
    assert measured(folder) == {4: None, 6: None}, "no loss, which is not a loss of 0"
    assert summary(folder)["valid_loss"] is None, "NaN is not JSON"
    assert sum("rows, which are damaged" in line for line in caplog.messages) == 2
    assert train("--data.on_corrupt", "quarantine") == ExitCode.DONE


def summary(folder):
    return json.loads((folder / "summary.json").read_text())
