"""What the loss launches in the papers' models, and awkward cases."""

import torch

from benchmarks.kernel_variants.variant import Variant, variant_of
from xlstm_kernels.cross_entropy.triton import plan_gradient, plan_statistics


def triton_variants(target: str) -> list[Variant]:
    """The logits of the 7B, a slice of them, and odd ones."""
    del target  # one table for all
    meta = {"device": "meta"}
    variants = []
    for name, rows, width, dtype, cap in (
        ("7b", 8192, 8192, torch.bfloat16, 30.0),
        ("no cap", 16384, 50304, torch.bfloat16, None),
        ("odd", 33, 70, torch.float32, 30.0),
    ):
        logits = torch.empty(rows, width, dtype=dtype, **meta)
        labels = torch.empty(rows, dtype=torch.int64, **meta)
        one, two, three = (torch.empty(rows, **meta) for _ in range(3))
        statistics = plan_statistics(logits, labels, (one, two, three), cap)
        variants.append(variant_of(statistics, name, "fw"))
        variants.append(variant_of(plan_gradient(logits, labels, one, two, cap), name, "bw"))
    return variants
