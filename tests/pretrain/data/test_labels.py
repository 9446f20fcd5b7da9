"""Labels of shards reach the batches, alone and mixed with shards that have none."""

import shutil

import numpy as np
import pytest
import torch

from pretrain.config.ramp import BatchRamp
from pretrain.data import (
    Batch,
    CorruptShardError,
    DataPlan,
    Phase,
    TokenDataset,
    TrainLoader,
    ValidLoader,
)
from pretrain.data.dataset import read_rows
from tests.data_prep.small_corpus import run
from xlstm_io.shards.rows import no_label

SEQ_LEN = 16
NONE = no_label("uint16")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    out = tmp_path_factory.mktemp("task")
    flags = ["--length", "3-14", "--seq-len", SEQ_LEN, "--samples", 200, "--validation-samples", 30]
    assert run("synthetic", "parity", "--out", out, *flags) == 0
    return out / "train"


def parities(row):
    """Labels and mask of a row of samples, from its tokens and boundaries."""
    labels, mask = np.zeros(SEQ_LEN, np.int64), np.zeros(SEQ_LEN, np.float32)
    tokens, boundaries = row
    starts = np.flatnonzero(boundaries).tolist()
    for start, end in zip(starts, [*starts[1:], SEQ_LEN], strict=True):
        sample = tokens[start:end][tokens[start:end] > 0]
        last = start + len(sample) - 1
        labels[last], mask[last] = (sample == 2).sum() % 2 + 1, 1.0
    return labels, mask


def test_batches_have_the_labels_and_their_mask(labelled):
    dataset = TokenDataset(labelled, seq_len=SEQ_LEN)
    batch = Batch.of(dataset.read(np.arange(dataset.num_rows)))
    assert batch.labels.dtype == torch.int64 and batch.loss_mask.dtype == torch.float32
    for tokens, boundaries, labels, mask in zip(
        *(part.numpy() for part in (batch.tokens, batch.boundaries, batch.labels, batch.loss_mask)),
        strict=True,
    ):
        expected = parities((tokens, boundaries))
        assert (labels == expected[0]).all() and (mask == expected[1]).all()
    targets = sum(entry.targets for entry in dataset.manifest.shards("train"))
    assert batch.loss_mask.sum().item() == targets == 200


def test_rows_past_the_end_of_validation_have_no_loss(labelled):
    dataset = TokenDataset(labelled, "valid", seq_len=SEQ_LEN)
    batches = list(ValidLoader(dataset, micro_batch=dataset.num_rows - 1))
    assert len(batches) == 2
    assert batches[1].loss_mask[1:].sum() == 0
    assert sum(batch.loss_mask.sum().item() for batch in batches) == 30


def test_a_mixture_keeps_labels_and_next_tokens_apart(labelled, shards):
    """Rows of both kinds in one batch are what each folder gives alone."""
    datasets = [TokenDataset(path, seq_len=SEQ_LEN) for path in (labelled, shards)]
    which = np.array([0, 1, 1, 0, 1])
    rows = np.array([3, 0, 5, 1, 2])
    both = Batch.of(read_rows(datasets, which, rows))
    for place, kind in enumerate(which):
        alone = Batch.of(datasets[kind].read(rows[place : place + 1]))
        assert (both.tokens[place] == alone.tokens[0]).all()
        assert (both.boundaries[place] == alone.boundaries[0]).all()
        assert (both.loss_mask[place] == alone.loss_mask[0]).all()
        counted = both.loss_mask[place] > 0
        assert (both.labels[place][counted] == alone.labels[0][counted]).all()


def test_workers_hand_over_labels(labelled):
    def batches(workers):
        plan = DataPlan(
            {"task": TokenDataset(labelled, seq_len=SEQ_LEN)}, [Phase(0, {"task": 1.0})], seed=3
        )
        with TrainLoader(plan, BatchRamp(4), micro_batch=2, workers=workers) as loader:
            return [batch for _ in range(3) for batch in next(loader)]

    for here, there in zip(batches(0), batches(1), strict=True):
        pairs = zip(vars(here).values(), vars(there).values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_damaged_labels_are_quarantined_as_rows_without_a_loss(labelled, tmp_path):
    copy = shutil.copytree(labelled, tmp_path / "copy")
    dataset = TokenDataset(copy, seq_len=SEQ_LEN, quarantine=True)
    (entry,) = dataset.manifest.shards("train")
    path = copy / entry.path
    data = bytearray(path.read_bytes())
    data[data.index(b"b000000.lab") + 512] ^= 1
    path.write_bytes(data)
    rows = dataset.read(np.arange(4))
    assert len(rows.damaged) == 4 and (rows.labels == NONE).all()
    assert Batch.of(rows).loss_mask.sum() == 0
    with pytest.raises(CorruptShardError, match="block 0"):
        TokenDataset(copy, seq_len=SEQ_LEN).read(np.arange(1))
