"""The trainer on a mixture with phases, windows, a ramp and damage: stopped and resumed."""

import json
import shutil

import pytest

from benchmarks.loader.synthetic_shards import write_shards
from pretrain.checkpoint import CheckpointError, find_latest, read_manifest
from pretrain.watching.metrics import read_metrics
from tests.dist import work

SEQ_LEN, STEPS = 24, 6
PHASES = [{"from_sample": 13, "weights": {"b": 1}}]
LATER = {"from_sample": 23, "weights": {"a": 1}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixture")
    sizes = {"a": [12, 9, 7], "b": [10, 8]}
    write_shards(root, sizes, seq_len=SEQ_LEN, vocab_size=96, block_rows=4, valid_rows=6)
    for split in ("b/train", "a/valid"):
        tar = root / split / "shard-00000000.tar"
        raw = bytearray(tar.read_bytes())
        raw[700] ^= 2  # in the first block
        tar.write_bytes(raw)
    return root


def train(config):
    from pretrain.commands.run.train import main

    return main(config)


def run_config(shards, folder, steps=STEPS, phases=PHASES, **changes):
    sources = [
        {"name": name, "path": str(shards), "source": name, "weight": weight}
        for name, weight in (("a", 3), ("b", 1))
    ]
    return work.run_config(
        "large",
        data__path=None,
        data__sources=sources,
        data__phases=phases,
        data__batch_ramp=[{"steps": 2, "global_batch": 2}, {"steps": 2, "global_batch": 6}],
        data__shuffle="window",
        data__window_shards=2,
        data__on_corrupt="quarantine",
        run__dir=str(folder),
        run__steps=steps,
        schedule__name="constant",
        logging__interval=1,
        **changes,
    )


def records(folder, *keys):
    found = read_metrics(folder / "metrics.jsonl")
    return [[record[key] for record in found if key in record] for key in keys]


def cursor(folder):
    return read_manifest(find_latest(folder)).state["cursor"]


@pytest.mark.dist
def test_stopped_in_the_middle_and_resumed_on_other_processes(pool, shards, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert pool(1, train, run_config(shards, whole)) == [0]
    assert pool(2, train, run_config(shards, cut, steps=3)) == [0] * 2  # DP 2, in the ramp
    assert cursor(cut)["consumed_samples"] == 2 * 2 + 6
    # a phase that begins later may be added, and changed while it lies ahead
    assert pool(1, train, run_config(shards, cut, steps=4, phases=[*PHASES, LATER])) == [0]
    assert pool(2, train, run_config(shards, cut)) == [0] * 2
    keys = ("loss", "grad_norm", "tokens")
    for key, expected, got in zip(keys, records(whole, *keys), records(cut, *keys), strict=True):
        assert len(expected) == STEPS and got == pytest.approx(expected, rel=1e-5), key
    for key in ("loss/a", "loss/b"):
        (expected,), (got,) = records(whole, key), records(cut, key)
        assert len(expected) > 2 and got == pytest.approx(expected, rel=1e-5), key
    (mean,), (a,), (b,) = records(whole, "valid_loss", "valid_loss/a", "valid_loss/b")
    assert min(a, b) < mean < max(a, b)  # by their tokens: tests/pretrain/test_evaluate.py
    for key in ("valid_loss", "valid_loss/a"):  # of the two sound rows of a
        (expected,), (got,) = records(whole, key), records(cut, key)
        assert got[-1] == pytest.approx(expected[-1], rel=1e-5), key
    one, two = cursor(whole), cursor(cut)
    assert one == two and one["consumed_samples"] == 4 + 12 + 2 * 4
    samples = [row["sample"] for row in one["quarantined"]]
    assert samples and samples == sorted(samples)
    lines = [
        json.loads(line)["sample"]
        for file in cut.glob("quarantine-*.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert sorted(lines) == samples


@pytest.mark.dist
def test_a_run_meets_no_more_damaged_rows_than_it_may(pool, shards, tmp_path):
    """Those that an earlier life has met count too."""
    run = tmp_path / "run"
    assert pool(1, train, run_config(shards, run)) == [0]
    less = len(cursor(run)["quarantined"]) - 1
    with pytest.raises(AssertionError, match=rf"more than data\.max_quarantined={less}, in"):
        pool(1, train, run_config(shards, run, steps=STEPS + 1, data__max_quarantined=less))


@pytest.mark.dist
def test_another_plan_is_refused_unless_it_is_meant(pool, shards, tmp_path):
    run = tmp_path / "run"
    assert pool(1, train, run_config(shards, run, steps=4)) == [0]
    other = [{"from_sample": 13, "weights": {"a": 1, "b": 1}}]
    with pytest.raises(AssertionError, match=CheckpointError.__name__) as caught:
        pool(1, train, run_config(shards, run, phases=other))
    for part in ("cursor.plan.phases.13.b: checkpoint 1.0, run 0.5", "accept_changes"):
        assert part in str(caught.value)
    fresh = shutil.copytree(run, tmp_path / "fresh")
    meant = run_config(shards, fresh, phases=other, checkpoint__accept_changes=["cursor.plan"])
    assert pool(1, train, meant) == [0]
    saved = cursor(fresh)
    assert saved["plan"]["phases"]["13"] == {"a": 0.5, "b": 0.5}
    # it went on as the new plan says: the same rows as a run that had it from the start
    assert pool(1, train, run_config(shards, tmp_path / "new", phases=other)) == [0]
    assert [r[-2:] for r in records(fresh, "step")] == [
        r[-2:] for r in records(tmp_path / "new", "step")
    ]
    damaged = [row["sample"] for row in cursor(tmp_path / "new")["quarantined"]]
    after = [row["sample"] for row in saved["quarantined"] if row["sample"] >= 16]
    assert after == [sample for sample in damaged if sample >= 16]
