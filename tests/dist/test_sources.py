"""Losses told apart by source: exact on every layout, and equal to rows that are computed alone."""

from dataclasses import replace

import pytest
import torch

from tests.dist import work

LAYOUTS = [
    (2, {"layout__tensor": 2, "layout__sequence": True}),
    (2, {"layout__pipeline": 2}),
    (2, {"layout__context": 2}),
    (4, {"layout__tensor": 2}),
    (2, {"engine__name": "deepspeed", "engine__zero_stage": 2}),
]


def batches_of_two_sources(config):
    rows = torch.eye(2, dtype=torch.float64)
    batches = work.random_batches(config, 0)
    return [replace(batch, sources=rows[batch.tokens[:, 0] % 2]) for batch in batches]


def sums_of(config):
    """Loss, tokens, and both by source, of the first global batch."""
    engine, layout = work.make_engine(config)
    size, replica = layout.dp_size, layout.dp_rank
    return engine.forward_backward(batches_of_two_sources(config)[replica::size]).tolist()


def sums_row_by_row(config):
    engine, _ = work.make_engine(config)
    found = [[0.0, 0.0], [0, 0]]
    for batch in batches_of_two_sources(config):
        for row in batch.split(1):
            source = int(row.sources[0].argmax())
            loss = engine.evaluate([row])
            found[0][source] += loss.total
            found[1][source] += loss.tokens
    return found


@pytest.mark.dist
def test_losses_of_sources_are_those_of_their_rows_on_every_layout(pool):
    ((losses, tokens),) = pool(1, sums_row_by_row, work.run_config("large"))
    assert min(tokens) > 0
    for ranks, changes in LAYOUTS:
        if "engine__name" in changes:
            pytest.importorskip("deepspeed")
        for total, number, *sums in pool(ranks, sums_of, work.run_config("large", **changes)):
            assert sums == pytest.approx([*losses, *tokens], rel=1e-5), changes
            assert sums[2:] == tokens and number == sum(tokens)
            assert total == pytest.approx(sum(losses), rel=1e-5)
