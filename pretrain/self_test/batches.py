"""Random tokens in the shape of a run's global batches, the same on every layout."""

import torch

from pretrain.config import RunConfig, micro_batches
from pretrain.data import Batch
from pretrain.layout import Layout

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
    places = -(-data.global_batch // data.micro_batch) * data.micro_batch
    for number in range(places):
        row = torch.randint(0, tokens, (data.seq_len + 1,), generator=rng)
        starts = torch.rand(data.seq_len, generator=rng) < DOCUMENT_STARTS
        mask = torch.ones(data.seq_len)
        mask[:-1][starts[1:]] = 0.0
        mask *= float(number < data.global_batch)  # beyond it with data.fill_batch alone
        rows.append((row[:-1], row[1:], mask, starts, torch.zeros(0, dtype=torch.float64)))
    size = data.micro_batch
    return [
        Batch(*(torch.stack(part) for part in zip(*rows[i : i + size], strict=True)))
        for i in range(0, len(rows), size)
    ]


def share_of(config: RunConfig, layout: Layout, step: int) -> list[Batch]:
    """The micro-batches of a step that this replica computes, filled up where they are too few.

    Args:
        config: the run, for its sizes.
        layout: where this process stands.
        step: decides the tokens.
    """
    batches = random_batches(config, step)
    mine = batches[layout.dp_rank :: layout.dp_size]
    missing = micro_batches(config, layout.dp_size) - len(mine)
    return mine + [batches[0].without_loss()] * missing
