"""What the norm of the heads launches in the papers' models, and awkward cases."""

import torch

from benchmarks.kernel_variants.variant import Variant, variant_of
from xlstm_kernels.norm import skip_triton
from xlstm_kernels.norm.triton import plan_backward, plan_forward


def triton_variants(target: str) -> list[Variant]:
    """The norms of the 7B and of the 125M model, and odd ones."""
    del target  # one table for all
    variants = []
    for name, (outer, inner, heads, d), dtype, gated, centered, setting in (
        ("7b norm and gate", (8192, 1, 8, 512), torch.bfloat16, True, True, ""),
        ("7b block", (8192, 1, 1, 4096), torch.bfloat16, False, False, ""),
        ("125m norm", (8, 2048, 4, 192), torch.bfloat16, False, True, ""),
        ("rms", (33, 2, 3, 20), torch.float32, False, False, ""),
        ("gated rms", (33, 2, 3, 4096), torch.float32, True, False, ""),
    ):
        # As the 7B-style block hands them over: another order of axes, and a slice.
        x = torch.empty(inner, heads, outer, d, dtype=dtype, device="meta").permute(2, 0, 1, 3)
        gate = None
        if gated:
            gate = torch.empty(outer, inner, 3 * heads, d, dtype=dtype, device="meta")
            gate = gate[:, :, 2 * heads :]
        new = torch.empty(outer, inner, heads, d, dtype=dtype, device="meta")
        weight = torch.empty(heads * d, device="meta")
        d_gate = None if gate is None else torch.empty_like(new)
        forward = plan_forward(x, weight, gate, new, 1e-6, centered)
        backward, _ = plan_backward(
            new, x, weight, gate, torch.empty_like(new), d_gate, 1e-6, centered
        )
        variants.append(variant_of(forward, name, "fw", setting=setting))
        variants.append(variant_of(backward, name, "bw", setting=setting))
        if gated:
            d_x, y = torch.empty_like(new), torch.empty_like(new)
            again, _ = plan_backward(new, x, weight, gate, d_x, d_gate, 1e-6, centered, y=y)
            variants.append(variant_of(again, f"{name}, with result", "bw", setting=setting))
    rows = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
    weight, no_gate = torch.empty(4096, device="meta"), (None, rows, 1e-6, False, "row")
    forward = plan_forward(rows, weight, *no_gate, added=rows, total=rows)
    backward, _ = plan_backward(
        rows, rows, weight, None, rows, None, 1e-6, False, "row", d_total=rows
    )
    variants.append(variant_of(forward, "7b sum and norm", "fw"))
    variants.append(variant_of(backward, "7b sum and norm", "bw"))
    skip_rows = torch.empty(2048, 4, 2 * 4096, dtype=torch.bfloat16, device="meta")
    odd = torch.empty(33, 2, 2 * 3 * 20, device="meta")
    for name, wide, heads in (("1.3b", skip_rows, 4), ("odd", odd, 3)):
        s, b, width = wide.shape
        part, weight = wide[..., : width // 2], torch.empty(width // 2, device="meta")
        h = torch.empty(b, heads, s, width // 2 // heads, dtype=wide.dtype, device="meta")
        y, d_h, d_x, d_gate = (torch.empty_like(part) for _ in range(4))
        inputs = h, weight, torch.empty_like(weight), torch.empty_like(part), part
        forward = skip_triton.plan_forward(*inputs, y, 1e-5, True)
        backward, _ = skip_triton.plan_backward(y, *inputs, d_h, d_x, d_gate, 1e-5, True)
        variants.append(variant_of(forward, f"{name} norm, skip and gate", "fw"))
        variants.append(variant_of(backward, f"{name} norm, skip and gate", "bw"))
        again, _ = skip_triton.plan_backward(y, *inputs, d_h, d_x, d_gate, 1e-5, True, y)
        named = f"{name} norm, skip and gate, with result"
        variants.append(variant_of(again, named, "bw"))
    return variants
