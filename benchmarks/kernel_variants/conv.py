"""What the convolution launches in the papers' models, and awkward cases."""

import torch

from benchmarks.kernel_variants.variant import Variant, variant_of
from xlstm_kernels.conv.triton import plan_backward, plan_forward


def triton_variants(target: str) -> list[Variant]:
    """What this module launches: the 125M settings, and odd ones."""
    del target  # one table for all
    meta = {"device": "meta"}
    variants = []
    cases = [("125m m", 8, 2048, 1536, 4, torch.bfloat16, True, True, False)]
    cases += [("125m s", 8, 2048, 768, 4, torch.bfloat16, True, True, False)]
    cases += [("plain", 2, 65, 70, 3, torch.float32, False, False, True)]
    cases += [("carried", 2, 65, 128, 4, torch.bfloat16, True, True, True)]
    for name, b, s, c, taps, dtype, silu, bounded, carried in cases:
        x = torch.empty(b, s, c, dtype=dtype, **meta)
        weight, bias = torch.empty(c, taps, dtype=dtype, **meta), torch.empty(c, **meta)
        before = torch.empty(b, c, taps - 1, **meta) if carried else None
        starts = torch.empty(b, s, dtype=torch.uint8, **meta) if bounded else None
        forward = plan_forward(x, weight, bias, before, starts, silu, torch.empty_like(x))
        more = torch.empty_like(x) if bounded else None
        backward, _ = plan_backward(
            torch.empty_like(x), x, weight, bias, before, starts, silu, more, torch.empty_like(x),
            None if before is None else torch.empty_like(before),
        )  # fmt: skip
        setting = "125m" if "125m" in name else ""
        variants.append(variant_of(forward, name, "fw", setting=setting))
        variants.append(variant_of(backward, name, "bw", setting=setting))
    return variants
