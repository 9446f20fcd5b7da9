"""Validation loss of a checkpoint, in one process, whatever layout trained it."""

import math

import torch

from pretrain.checkpoint import check_same, read_manifest, resolve
from pretrain.config import RunConfig
from pretrain.data import TokenDataset, ValidLoader
from xlstm_mcore import cpu_runtime
from xlstm_mcore.build import load_model


def main(checkpoint: str, config: RunConfig) -> int:
    """Print the loss of ``checkpoint`` on the validation split of ``config.data``.

    Args:
        checkpoint: a checkpoint or a run folder.
        config: the run file whose data and batch to use; the model is the checkpoint's.

    Returns:
        0.

    Raises:
        UserError: no checkpoint, no data, or the data were made with another tokenizer.
    """
    loss, tokens = evaluate(checkpoint, config)
    print(
        f"{resolve(checkpoint)}: {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}, "
        f"over {tokens:,} tokens"
    )
    return 0


@torch.no_grad()
def evaluate(checkpoint: str, config: RunConfig) -> tuple[float, int]:
    """Mean loss (nats per unmasked token) and number of tokens of the validation split."""
    path = resolve(checkpoint)
    data = TokenDataset(config.data.path, "valid", seq_len=config.data.seq_len)
    now = {"tokenizer": {"sha256": data.manifest.tokenizer_sha256}}
    check_same(read_manifest(path).state, now, ("tokenizer.sha256",), path=path)
    model, _ = load_model(path)
    total, tokens = 0.0, 0
    for batch in ValidLoader(data, micro_batch=config.data.micro_batch):
        batch = batch.to(cpu_runtime.device())
        losses = model(batch.tokens, batch.boundaries, batch.labels)
        total += (losses * batch.loss_mask).sum().item()
        tokens += int(batch.loss_mask.sum().item())
    return total / max(1, tokens), tokens
