"""Validation loss of a checkpoint, whatever layout trained it.

In one process, or tensor parallel over all processes of torchrun.
"""

import math
import os

import torch

from pretrain.checkpoint import read_manifest
from pretrain.commands.generate import check_split
from pretrain.config import RunConfig
from pretrain.data import TokenDataset, ValidLoader, open_valid
from xlstm_io.checkpoint.choose import choose
from xlstm_io.errors import ConfigError
from xlstm_io.storage import Location
from xlstm_mcore.inference import open_model
from xlstm_mcore.megatron import cpu_runtime


def main(checkpoint: str, config: RunConfig, *, which: str | None = None) -> int:
    """Print the loss of `checkpoint` on the validation split of `config.data`.

    Args:
        checkpoint: a checkpoint or a run folder.
        which: which checkpoint of a run; see `xlstm_io.checkpoint.choose`.
        config: the run file whose data and batch to use; the model is the checkpoint's.

    Returns:
        0.

    Raises:
        UserError: no checkpoint, no data, or the data were made with another tokenizer.
    """
    path = choose(checkpoint, which)
    found = evaluate(path, config)
    if os.environ.get("RANK", "0") != "0":
        return 0
    for name, (loss, tokens) in found.items():
        print(
            f"{path}{f', {name}' if name else ''}: {loss:.4f} nats per token, "
            f"perplexity {math.exp(loss):.2f}, over {tokens:,} tokens"
        )
    if len(found) > 1:
        mean = sum(loss for loss, _ in found.values()) / len(found)
        print(f"mean of the {len(found)} sets: {mean:.4f} nats per token")
    return 0


@torch.no_grad()
def evaluate(path: Location | str, config: RunConfig) -> dict[str, tuple[float, int]]:
    """By validation set: mean loss (nats per unmasked token) and number of tokens."""
    sets = open_valid(config.data)
    trained_with = read_manifest(path).state.get("tokenizer", {}).get("sha256")
    for dataset in sets.values():
        if dataset.manifest.tokenizer_sha256 != trained_with:
            raise ConfigError(
                f"{dataset.manifest.root} was built with another tokenizer (sha256 "
                f"{dataset.manifest.tokenizer_sha256}) than {path} was trained with (sha256 "
                f"{trained_with}), so its ids mean other text; build the data with that tokenizer"
            )
    check_split(path)
    model = open_model(path)
    return {name: _loss(model, dataset, config) for name, dataset in sets.items()}


def _loss(model: torch.nn.Module, dataset: TokenDataset, config: RunConfig) -> tuple[float, int]:
    total, tokens = 0.0, 0
    for batch in ValidLoader(dataset, micro_batch=config.data.micro_batch):
        batch = batch.to(cpu_runtime.device())
        losses = model(batch.tokens, batch.boundaries, batch.labels)
        total += (losses * batch.loss_mask).sum().item()
        tokens += int(batch.loss_mask.sum().item())
    return total / max(1, tokens), tokens
