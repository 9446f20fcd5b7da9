"""Random tokens in the shape of a run's global batches, the same on every layout."""

import torch

from pretrain.config import RunConfig
from pretrain.data import Batch

DOCUMENT_STARTS = 0.15  # share of positions where a document begins


def random_batches(config: RunConfig, step: int) -> list[Batch]:
    """All micro-batches of a step, with documents of random lengths and masked targets.

    Args:
        config: the run, for its sizes.
        step: decides the tokens.
    """
    data, tokens = config.data, config.model.vocab_tokens or config.model.vocab_size
    rng = torch.Generator().manual_seed(1000 + step)
    rows = []
    for _ in range(data.global_batch):
        row = torch.randint(0, tokens, (data.seq_len + 1,), generator=rng)
        starts = torch.rand(data.seq_len, generator=rng) < DOCUMENT_STARTS
        mask = torch.ones(data.seq_len)
        mask[:-1][starts[1:]] = 0.0
        rows.append((row[:-1], row[1:], mask, starts, torch.zeros(0, dtype=torch.float64)))
    size = data.micro_batch
    return [
        Batch(*(torch.stack(part) for part in zip(*rows[i : i + size], strict=True)))
        for i in range(0, len(rows), size)
    ]
