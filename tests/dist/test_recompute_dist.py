"""Recomputed activations change no bit of any layout's gradients, dropout included."""

import pytest
import torch

from tests.dist import work

LAYOUTS = {
    "tp2_sp": ("mixed", 2, {"layout__tensor": 2, "layout__sequence": True}),
    "pp2_vpp2": ("mixed", 2, {"layout__pipeline": 2, "layout__virtual": 2}),
    "tp2_sp_attention": ("hybrid", 2, {"layout__tensor": 2, "layout__sequence": True}),
    "pp2_tp2_sp": (
        "classic",
        4,
        {"layout__pipeline": 2, "layout__tensor": 2, "layout__sequence": True},
    ),
}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_recompute_changes_no_bit(pool, layout):
    model, ranks, shape = LAYOUTS[layout]
    shape = {**shape, "model__dropout": 0.2}
    expected = pool(ranks, work.fp64_gradients, work.run_config(model, **shape))
    for mode in ("selective", "full"):
        config = work.run_config(model, **shape, memory__recompute=mode)
        for (loss, chunks), (true_loss, true_chunks) in zip(
            pool(ranks, work.fp64_gradients, config), expected, strict=True
        ):
            assert loss == true_loss
            for got, want in zip(chunks, true_chunks, strict=True):
                assert torch.equal(got.tensor, want.tensor), (mode, got.name)
