"""What gated activations launch in the papers' models, and awkward cases."""

import torch

from benchmarks.kernel_variants.variant import Variant, variant_of
from xlstm_kernels.gated.triton import plan_backward, plan_forward


def triton_variants(target: str) -> list[Variant]:
    """The SwiGLU of the 7B and the GeGLU of the 125M model, and odd ones."""
    del target  # one table for all
    variants = []
    for name, rows, width, dtype, gelu in (
        ("7b", 8192, 10944, torch.bfloat16, False),
        ("125m", 16384, 1024, torch.bfloat16, True),
        ("odd", 33, 70, torch.float32, True),
    ):
        both = torch.empty(rows, 2 * width, dtype=dtype, device="meta")
        out = torch.empty(rows, width, dtype=dtype, device="meta")
        forward = plan_forward(both, out, gelu)
        backward = plan_backward(out, both, torch.empty_like(both), gelu)
        variants.append(variant_of(forward, name, "fw"))
        again = plan_backward(out, both, torch.empty_like(both), gelu, torch.empty_like(out))
        variants.append(variant_of(backward, name, "bw"))
        variants.append(variant_of(again, f"{name} with result", "bw"))
    return variants
