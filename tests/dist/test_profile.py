"""A profile of some steps, and what a run says that has no memory left."""

import gzip
import json
import os
from unittest import mock

import pytest
import torch

import pretrain.commands.run.train
from pretrain.config import config_from_dict
from pretrain.engines.megatron import MegatronEngine
from pretrain.watching.metrics import read_metrics
from tests.dist.training_runs import tiny_run
from xlstm_io.errors import ConfigError

pytestmark = pytest.mark.dist


def train(raw):
    return pretrain.commands.run.train.main(config_from_dict(raw))


def train_and_listen(raw, folder):
    """The exit code, and what C++ has printed."""
    before, printed = os.dup(2), folder / f"stderr-{os.environ['RANK']}"
    with open(printed, "wb") as file:
        os.dup2(file.fileno(), 2)
        try:
            code = train(raw)
        finally:
            os.dup2(before, 2)
            os.close(before)
    return code, printed.read_text()


def test_every_rank_leaves_a_trace_and_a_table(pool, shards, tmp_path):
    raw = tiny_run(tmp_path, shards, run__steps=5, logging__profile={"from_step": 2, "steps": 2})
    said = tmp_path / "said"
    said.mkdir()
    (code, text), (other, _) = pool(2, train_and_listen, raw, said)
    assert (code, other) == (0, 0)
    assert "done: 5 steps, which took" in text and "profiler_start" not in text
    (folder,) = (tmp_path / "profile").iterdir()
    assert folder.name == "step-00000002"
    names = [f"rank_{rank}{end}" for rank in range(2) for end in (".json.gz", ".txt")]
    assert sorted(path.name for path in folder.iterdir()) == names
    for rank in range(2):
        events = json.loads(gzip.open(folder / f"rank_{rank}.json.gz").read())["traceEvents"]
        assert sum(event["name"] == "aten::mm" for event in events) > 4
        assert "Self CPU" in (folder / f"rank_{rank}.txt").read_text()
    log = (tmp_path / "logs/life-000001/rank_0.log").read_text()
    assert f"profiled steps 2 to 3: {folder}" in log
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5


def train_out_of_memory(raw):
    original, steps = MegatronEngine.forward_backward, []

    def forward_backward(engine, batches):
        steps.append(None)
        if len(steps) == 2:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 7.00 GiB.")
        return original(engine, batches)

    with mock.patch.object(MegatronEngine, "forward_backward", forward_backward):
        try:
            return train(raw)
        except ConfigError as error:
            return str(error)


def test_a_run_without_memory_says_what_to_change_and_what_that_saves(pool, shards, tmp_path):
    raw = tiny_run(tmp_path, shards, memory__recompute="none")
    (said,) = pool(1, train_out_of_memory, raw)
    assert "rank 0 ran out of memory after 1 step of this start: out of memory. Tried" in said
    assert "by the plan's count the fullest rank has" in said
    assert "optimizer state" in said and "weights" in said
    assert "--memory.recompute selective: " in said and said.count("which fits") == 1
