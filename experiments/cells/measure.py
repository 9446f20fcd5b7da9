"""What a trained model is worth on a set: loss by position, and how labels are answered."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from pretrain.config import RunConfig
from pretrain.data import TokenDataset, ValidLoader
from pretrain.engines.base import LossSum
from pretrain.evaluation import losses
from pretrain.evaluation.answers import Answers
from pretrain.evaluation.losses import SetLoss
from xlstm_io.checkpoint.choose import BEST, choose
from xlstm_io.shards.manifest import load_manifest
from xlstm_mcore import hardware
from xlstm_mcore.inference import open_model
from xlstm_mcore.model import XLSTMModel

_TOKENS = 4096  # of a forward pass


@torch.no_grad()
def measure(
    config: RunConfig,
    shards: Path,
    numbers: Sequence[float | None] | None = None,
    by: Collection[str] = (),
) -> dict[str, Any]:
    """Measure a run on the validation split of a folder, at its best checkpoint if it keeps that.

    Otherwise the newest is measured.

    Args:
        config: the run.
        shards: a folder of shards, of the task or text that the run was trained on.
        numbers: the number that each id stands for, None for other ids; without them there is no
            squared error.
        by: what the loss is also sorted by: "frequency" of the target in the training data,
            "source".

    Returns:
        `loss` (nats), `answers` (positions with a loss), and `by_position`: a list of the same for
        the tokens number `from` to `2 from - 1` of their samples or documents. With labels also
        `accuracy`, and with `numbers` `squared_error`. By frequency `by_frequency` is such a list,
        and by source `by_source` has the loss of each.
    """
    seq_len = load_manifest(shards).seq_len
    rows = max(1, _TOKENS // seq_len)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"micro_batch": rows})}
    )
    dataset = TokenDataset(str(shards), "valid", seq_len=seq_len)
    which = BEST if config.checkpoint.keep_best else None
    model = open_model(choose(config.run.dir, which))
    found = losses.measure(model, dataset, config, "position")
    whole: dict[str, Any] = {**_numbers(found.sum, found.answers), "by_position": _groups(found)}
    if "frequency" in by:
        trained = TokenDataset(str(config.data.path), "train", seq_len=config.data.seq_len)
        counts = losses.frequencies(trained, rows)
        sorted_ = losses.measure(model, dataset, config, "frequency", frequency=counts)
        whole["by_frequency"] = _groups(sorted_)
    if "source" in by:
        whole["by_source"] = {
            name: losses.measure(model, one, config).loss
            for name, one in _sources(shards, seq_len).items()
        }
    if numbers is not None:
        whole["squared_error"] = squared_error(model, dataset, numbers, rows)
    return whole


def _sources(shards: Path, seq_len: int) -> dict[str, TokenDataset]:
    """The sources of a folder that have validation rows."""
    return {
        source.name: TokenDataset(str(shards), "valid", seq_len=seq_len, source=source.name)
        for source in load_manifest(shards).sources
        if "valid" in source.splits and source.splits["valid"].rows
    }


def _groups(found: SetLoss) -> list[dict[str, float]]:
    return [
        {"from": 2**n, **_numbers(loss, found.answers_by.get(n))} for n, loss in found.by.items()
    ]


def _numbers(loss: LossSum, answers: Answers | None) -> dict[str, float]:
    numbers = {"answers": loss.tokens, "loss": loss.mean}
    return numbers if answers is None else numbers | {"accuracy": answers.accuracy}


def squared_error(
    model: XLSTMModel, dataset: TokenDataset, numbers: Sequence[float | None], rows: int
) -> float:
    """Mean squared error of the numbers that a model says.

    A model says the mean of the numbers over its probabilities for the ids that stand for one.

    Args:
        model: in one process.
        dataset: whose labels are ids of numbers.
        numbers: the number of each id, None for other ids.
        rows: that are read at once.
    """
    device = hardware.device()
    ids = torch.tensor([number is not None for number in numbers], device=device)
    of_id = torch.tensor([0.0 if n is None else n for n in numbers], device=device)
    total, answers = 0.0, 0
    for batch in ValidLoader(dataset, micro_batch=rows):
        batch = batch.to(device)
        logits = model(batch.tokens, batch.boundaries).float()
        said = logits[..., ids].softmax(-1) @ of_id[ids]
        error = (said - of_id[batch.labels]).square()
        asked = batch.loss_mask > 0
        total += error[asked].double().sum().item()
        answers += int(asked.sum())
    return total / max(1, answers)
