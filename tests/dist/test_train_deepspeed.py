"""The trainer itself with DeepSpeed: losses, validation, checkpoints, and Megatron goes on."""

import pytest

from pretrain.watching.metrics import read_metrics
from tests.dist.needs import needs_deepspeed
from tests.dist.test_train_context import run_config, shards, train  # noqa: F401


@pytest.mark.dist
@needs_deepspeed
def test_training_with_zero_3_and_then_with_megatron(pool, shards, tmp_path):  # noqa: F811
    zero = {"engine__name": "deepspeed", "engine__zero_stage": 3}
    for name, changes in (("one", {}), ("two", zero)):
        ranks = 2 if changes else 1
        config = run_config(shards, tmp_path / name, **changes)
        assert pool(ranks, train, config) == [0] * ranks
        longer = config.model_copy(
            update={
                "run": config.run.model_copy(update={"steps": 5}),
                "engine": config.engine.model_copy(update={"name": "megatron", "zero_stage": 1}),
            }
        )
        assert pool(ranks, train, longer) == [0] * ranks
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for key in ("loss", "valid_loss", "grad_norm", "tokens"):
        expected = [record[key] for record in one if key in record]
        got = [record[key] for record in two if key in record]
        assert len(expected) >= 2
        assert got == pytest.approx(expected, rel=1e-5), key
