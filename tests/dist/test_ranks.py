"""A slow rank is found although its collectives end at the same time on all ranks."""

import inspect
import json
import os
import re
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import pretrain.commands.run.train
from pretrain import layout as layouts
from pretrain.config import config_from_dict
from pretrain.watching import ranks
from pretrain.watching.metrics import read_metrics
from pretrain.watching.ranks import CollectiveTimer
from tests.dist import work
from tests.dist.training_runs import tiny_run

pytestmark = pytest.mark.dist

SECONDS = 0.6


def between_collectives():
    """Seconds between collectives and of the whole, where rank 1 sleeps before each collective."""
    layout = layouts.start(work.run_config("large"))
    group, values = layout.groups.dp, torch.ones(4)
    timer = CollectiveTimer()
    dist.barrier()
    timer.start()
    started = time.perf_counter()
    for collective in (
        lambda: dist.all_reduce(values, group=group),
        lambda: dist.all_reduce(values, group=group, async_op=True).wait(),
        lambda: dist.all_gather_into_tensor(torch.empty(8), values, group=group),
    ):
        time.sleep(SECONDS * layout.rank)
        collective()
    timer.stop()
    whole = time.perf_counter() - started
    between = timer.seconds_between()
    dist.all_reduce(values, group=group)
    dist.broadcast_object_list([layout.rank])
    assert timer.seconds_between() == between, "everything is put back"
    return between, whole


def test_waiting_for_a_slow_rank_is_not_computing(pool):
    (fast, whole), (slow, _) = pool(2, between_collectives)
    assert whole > 2.5 * SECONDS and slow > 3 * SECONDS
    assert fast < whole - 2 * SECONDS, "all three waits are taken off"


def test_no_collective_of_this_torch_is_left_out():
    source = inspect.getsource(dist.distributed_c10d)
    called = set(re.findall(r"\bgroup\.([a-z_]+)\(", source))
    silent = {"_get_backend", "_start_coalescing", "rank", "set_timeout", "size"}
    missing = {
        name for name in called - silent - set(ranks.CALLS) if hasattr(dist.ProcessGroup, name)
    }
    assert not missing


def train_with_a_slow_rank(raw):
    """A run whose ranks measure what a test can compare, however busy this machine is."""
    rank = int(os.environ["RANK"])
    original = CollectiveTimer.seconds_between

    def seconds_between(timer):
        assert original(timer) > 0
        return 1.0 + 0.5 * rank

    with (
        mock.patch.dict(os.environ, {"SLURMD_NODENAME": f"node{rank}"}),
        mock.patch.object(ranks, "LOOKS", 2),
        mock.patch.object(CollectiveTimer, "seconds_between", seconds_between),
    ):
        return pretrain.commands.run.train.main(config_from_dict(raw))


def test_a_slow_host_is_in_the_log_the_metrics_and_the_progress_file(pool, shards, tmp_path):
    raw = tiny_run(tmp_path, shards, run__steps=5, logging__interval=2, logging__ranks=1)
    assert pool(2, train_with_a_slow_rank, raw) == [0, 0]
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    for record in records:
        found = [record[f"ranks/compute_seconds_{kind}"] for kind in ("min", "median", "max")]
        assert found == [1.0, 1.25, 1.5]
        assert record["ranks/data_wait_seconds_max"] >= 0 and record["ranks/host_seconds_min"] > 0
        assert record["ranks/slowest"] == 1
    assert json.loads((tmp_path / "progress.json").read_text())["stragglers"] == ["node1"]
    log = (tmp_path / "logs/life-000001/rank_0.log").read_text()
    assert log.count("host node1 is slow") == 1 and "ranks/" not in log
