"""What trains also evaluates, saves and generates: layouts of the support matrix.

With `--all-layouts` these are all that four processes hold, each with its self-test. Otherwise they
are drawn until every two values of an engine and of the layout's axes have met.
"""

import pytest

import pretrain.commands.run.train
import pretrain.self_test.resume
from pretrain import cli
from pretrain.checkpoint import find_latest
from pretrain.commands.after_run.evaluate import evaluate
from pretrain.config import config_from_dict, support
from pretrain.data import ValidLoader, open_valid
from pretrain.watching.metrics import read_metrics
from tests.dist import work
from tests.dist.matrix import MOST_RANKS, covering, name, ranks_and_changes, replica_ranks
from tests.dist.needs import needs_deepspeed

pytestmark = [
    pytest.mark.dist,
    needs_deepspeed,
]

CELLS = [
    cell
    for cell in support.supported()
    if replica_ranks(cell) <= MOST_RANKS
    and (cell.precision, cell.offload) == ("fp32", "none")
    and not cell.overlap_grad_reduce
]
STAGE_1 = [c for c in CELLS if (c.optimizer, c.zero_stage, c.sequence) == ("adamw", 1, c.tensor)]

SEED = 174  # of 3,000, one of those with the fewest cells and processes


def axes(cell):
    return cell.engine, cell.tensor, (cell.pipeline, cell.virtual), cell.context


def pytest_generate_tests(metafunc):
    every = metafunc.config.getoption("--all-layouts")
    if "cell" in metafunc.fixturenames:
        metafunc.parametrize("cell", CELLS if every else covering(STAGE_1, axes, SEED), ids=name)
    if "cell_by_command" in metafunc.fixturenames:
        metafunc.parametrize("cell_by_command", CELLS if every else [], ids=name)


def run_config(shards, folder, model, **changes):
    return work.run_config(
        model,
        run__dir=str(folder),
        run__steps=3,
        data__path=str(shards),
        data__seq_len=16,
        data__global_batch=8,
        data__micro_batch=2,
        model__vocab_size=336,
        evaluation__interval=2,
        logging__tensorboard=False,
        **changes,
    )


def train(raw):
    return pretrain.commands.run.train.main(config_from_dict(raw))


def self_test(raw):
    return pretrain.self_test.resume.main(config_from_dict(raw), 2)


def test_what_trains_evaluates_and_generates(pool, shards, tmp_path, cell, capfd):
    _, changes = ranks_and_changes(cell)
    ranks = replica_ranks(cell)
    config = run_config(shards, tmp_path, "large_deep", **changes)
    assert pool(ranks, train, config.model_dump()) == [0] * ranks
    records = read_metrics(tmp_path / "metrics.jsonl")
    losses = {r["step"]: r["valid_loss"] for r in records if "valid_loss" in r}
    assert losses.keys() == {2, 3}
    (measured,) = evaluate(str(find_latest(tmp_path)), config).values()
    assert losses[3] == pytest.approx(measured.loss, rel=2e-6) and measured.sum.tokens > 100
    assert cli.run(["generate", str(tmp_path), "--max-tokens", "2"]) == 0
    assert "--- prompt" in capfd.readouterr().out


def test_the_last_group_of_micro_batches_is_not_whole(shards):
    """Otherwise nothing above would see that it has to be filled up."""
    data = run_config(shards, "unused", "large_deep").data
    (dataset,) = open_valid(data).values()
    assert len(ValidLoader(dataset, micro_batch=data.micro_batch)) % 2 == 1


def test_what_trains_passes_the_self_test(pool, shards, tmp_path, cell_by_command):
    """With two replicas, where there is room, and all kinds of blocks."""
    ranks, changes = ranks_and_changes(cell_by_command)
    raw = run_config(shards, tmp_path, "mixed", **changes).model_dump()
    assert pool(ranks, self_test, raw) == [0] * ranks
