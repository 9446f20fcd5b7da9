"""A look into the layers gives the same figures on every layout, and changes nothing."""

import math

import pytest
import torch

import pretrain.commands.run.train
from pretrain import layout as layouts
from pretrain.config import config_from_dict
from pretrain.trainer import train_step
from pretrain.watching.cells import WIDTH, CellStatistics, CellWatcher
from pretrain.watching.metrics import read_metrics
from tests.dist import work
from tests.dist.needs import needs_deepspeed
from tests.dist.training_runs import tiny_run
from xlstm_mcore.mixers.observation import CellValues

pytestmark = pytest.mark.dist

ZERO = {"engine__name": "deepspeed"}


def look(model, changes):
    """Lines of the second step, on all ranks alike, with the whole gradient's norm."""
    ranks_of_data = changes.pop("replicas", 1)
    config = work.run_config(model, data__micro_batch=2 // ranks_of_data, **changes)
    engine, layout = work.make_engine(config)
    watcher = CellWatcher(config, layout, engine)
    # Every replica looks at its first micro-batch: together the same two rows on every layout.
    results = []
    for step in range(2):
        batches = work.random_batches(config, step)[layout.dp_rank :: layout.dp_size]
        results.append(train_step(engine, batches, 1e-2, watchers=[watcher]))
        lines = watcher.lines(step + 1, batches[0])
    return lines, results[-1].grad_norm


def alone(pool, model, **changes):
    ((lines, norm),) = pool(1, look, model, {"logging__cells": 1, **changes})
    return {line["layer"]: line for line in lines}, norm


@pytest.mark.parametrize(
    ("ranks", "model", "changes"),
    [
        pytest.param(2, "mixed", {"layout__tensor": 2, "layout__sequence": True}, id="tp2-sp"),
        pytest.param(2, "mixed", {"layout__context": 2}, id="cp2"),
        pytest.param(2, "mixed", {"layout__pipeline": 2, "layout__virtual": 2}, id="pp2-vpp2"),
        pytest.param(2, "mixed", {"replicas": 2, "memory__recompute": "full"}, id="dp2-recompute"),
        pytest.param(2, "mixed", {"replicas": 2, "optimizer__name": "muon"}, id="dp2-muon"),
        pytest.param(
            4, "hybrid", {"replicas": 2, "layout__tensor": 2, "model__tie_embeddings": True},
            id="dp2-tp2-tied",
        ),
        *(
            pytest.param(
                2, "mixed", {"replicas": 2, **ZERO, "engine__zero_stage": stage},
                id=f"deepspeed{stage}", marks=needs_deepspeed,
            )
            for stage in (1, 2, 3)
        ),
        pytest.param(
            2, "mixed", {**ZERO, "engine__zero_stage": 1, "layout__tensor": 2},
            id="deepspeed1-tp2", marks=needs_deepspeed,
        ),
    ],
)  # fmt: skip
def test_figures_are_those_of_one_process(pool, ranks, model, changes):
    kept = ("model__tie_embeddings", "optimizer__name")
    expected, norm = alone(pool, model, **{k: v for k, v in changes.items() if k in kept})
    assert norm == pytest.approx(
        math.hypot(*(line["grad_norm"] for line in expected.values())), rel=1e-5
    )
    for lines, _ in pool(ranks, look, model, {"logging__cells": 1, **changes}):
        assert [line["layer"] for line in lines] == list(expected)
        for line in lines:
            for key, value in expected[line["layer"]].items():
                if isinstance(value, str):
                    assert line[key] == value
                else:  # a quantile is exact to a bin, and rounding may move one value to the next
                    near = WIDTH if key.endswith(("_p05", "_p50", "_p95")) else 2e-4
                    assert line[key] == pytest.approx(value, rel=2e-3, abs=near), (key, line)


@needs_deepspeed
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_gradient_of_deepspeed_is_counted_once(pool, stage, precision):
    changes = {**ZERO, "engine__zero_stage": stage, "replicas": 2}
    changes |= {"engine__precision": precision, "logging__cells": 1}
    for lines, norm in pool(2, look, "mixed", changes):
        whole = math.hypot(*(line["grad_norm"] for line in lines))
        assert whole == pytest.approx(norm, rel=1e-5)
        assert all(line["update_norm"] > 0 for line in lines)


def test_the_distribution_is_that_of_the_pre_activations(pool):
    lines, _ = alone(pool, "mixed")
    assert [line["letter"] for line in list(lines.values())[:4]] == list("Msms")
    for layer in range(4):
        line = lines[layer]
        for gate in ("igate", "fgate"):
            order = [line[f"{gate}_{key}"] for key in ("min", "p05", "p50", "p95", "max")]
            assert order == sorted(order) and order[0] < order[-1]
            assert line[f"{gate}_min"] <= line[f"{gate}_mean"] <= line[f"{gate}_max"]
            assert 0 < line[f"{gate}_std"] < order[-1] - order[0]
        assert 0 <= line["normalizer_at_floor"] <= 1 and "state_log_norm" in line
    assert list(lines)[4:] == ["embedding", "final_norm", "output_layer"]
    assert all(0 < line["update_norm"] < line["weight_norm"] for line in lines.values())


def train(raw):
    return pretrain.commands.run.train.main(config_from_dict(raw))


def test_losses_are_the_same_and_every_step_has_one_look(pool, shards, tmp_path):
    losses = []
    for name, cells in (("plain", 0), ("looked", 2)):
        for steps in (5, 8):
            raw = tiny_run(tmp_path / name, shards, run__steps=steps, logging__cells=cells)
            raw["schedule"]["name"] = "constant"
            raw["checkpoint"]["interval"] = 3
            assert pool(1, train, raw) == [0]
        losses.append([r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl")])
    assert losses[0] == losses[1]
    assert not (tmp_path / "plain/cells.jsonl").exists()
    lines = read_metrics(tmp_path / "looked/cells.jsonl")
    found = [(line["step"], line["layer"]) for line in lines]
    parts = [0, "embedding", "final_norm", "output_layer"]
    assert found == [(step, part) for step in (2, 4, 6, 8) for part in parts]


def statistics_of(values):
    layout = layouts.start(work.run_config("large"))
    statistics = CellStatistics(2, layout.device)
    statistics.add(1, CellValues(values[layout.rank :: layout.world_size], values + 1, None, None))
    return statistics.reduce()


def test_quantiles_are_exact_to_a_bin_also_beyond_the_bins(pool):
    values = torch.cat((torch.linspace(-3, 5, 2001), torch.tensor([90.0, -80.0])))
    one, two = pool(2, statistics_of, values)
    assert one == two and list(one) == [1], "a layer without a cell has no figures"
    for name, share in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
        assert one[1][f"igate_{name}"] == pytest.approx(values.quantile(share).item(), abs=WIDTH)
    assert (one[1]["igate_min"], one[1]["fgate_max"]) == (-80.0, 91.0)
    assert one[1]["igate_std"] == pytest.approx(values.double().std(correction=0).item())
