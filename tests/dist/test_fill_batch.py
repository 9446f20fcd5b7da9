"""A global batch that the replicas do not divide trains as one that needs no filling."""

import pytest

import pretrain.commands.run.train
from pretrain.commands.before_run.check import describe_run
from pretrain.config import ConfigError, check_world, config_from_dict, micro_batches
from pretrain.run_folder import life_logs
from pretrain.watching.metrics import read_metrics
from tests.dist.training_runs import tiny_run


def train(raw):
    return pretrain.commands.run.train.main(config_from_dict(raw))


def losses(folder):
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "grad_norm" in r]
    assert [r["step"] for r in records if "valid_loss" in r] == [4]
    steps = {r["step"]: (r["loss"], r["grad_norm"], r["tokens"]) for r in records}
    return steps, records[-1]["valid_loss"]


@pytest.mark.dist
def test_three_replicas_train_four_rows_as_one_process_does(pool, shards, tmp_path):
    changes = {"run__steps": 4, "data__batch_ramp": [{"steps": 1, "global_batch": 2}]}
    raw = tiny_run(tmp_path / "three", shards, data__fill_batch=True, **changes)
    assert pool(3, train, raw) == [0] * 3
    assert pool(1, train, tiny_run(tmp_path / "one", shards, **changes)) == [0]
    (filled, measured), (plain, expected) = losses(tmp_path / "three"), losses(tmp_path / "one")
    assert measured == pytest.approx(expected, rel=1e-5)  # of four rows, and not of six
    assert filled.keys() == plain.keys() == {1, 2, 3, 4}
    for step, (loss, norm, tokens) in plain.items():
        # Sums in another order; the tight comparison is that of test_parallel.py.
        assert filled[step][:2] == (pytest.approx(loss, rel=1e-4), pytest.approx(norm, rel=1e-2))
        assert filled[step][2] == tokens
    said = "data.fill_batch computes 6 rows for 4: 50.0% more work per step, for 3 replicas"
    log = life_logs(tmp_path / "three", 1) / "rank_0.log"
    assert said in log.read_text(encoding="utf-8")


def test_the_cost_is_said_before_the_run():
    raw = tiny_run("run", "shards", data__global_batch=512, data__micro_batch=1)
    config = config_from_dict(raw)
    with pytest.raises(ConfigError, match=r"data\.fill_batch=true fills it"):
        check_world(config, 60)
    raw["data"]["fill_batch"] = True
    config = config_from_dict(raw)
    assert check_world(config, 60) == 60 and micro_batches(config, 60) == 9
    assert "computes 540 rows for 512: 5.5% more work" in describe_run(config, 60)
    assert "fill_batch" not in describe_run(config, 64)


def test_interleaved_stages_get_whole_groups():
    raw = tiny_run("run", "shards", data__global_batch=10, data__fill_batch=True)
    raw["model"]["pattern"] = "M|M|M|M"
    raw["layout"] = {"pipeline": 2, "virtual": 2}
    config = config_from_dict(raw)
    assert check_world(config, 2) == 1
    assert micro_batches(config, 1) == 6  # five hold the rows
