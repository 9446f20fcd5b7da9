"""What q, k, v and gates of the classic mLSTM launch in the papers' models, and odd cases."""

import torch

from benchmarks.kernel_variants.variant import Variant, variant_of
from xlstm_kernels.common.triton_launch import Launch
from xlstm_kernels.qkv.triton import (
    plan_backward,
    plan_forward,
    qkv_backward,
    qkv_forward,
)


def flops_of(launch: Launch) -> int:
    """Floating-point operations of tensor cores in one launch."""
    if launch.kernel not in (qkv_forward, qkv_backward):
        return 0
    known = launch.arguments
    tile, gates = known["TILE"], known["GATES"]
    # Products of a token's channel, for each of q, k and v.
    products = tile + gates if launch.kernel is qkv_forward else 3 * tile + 4 * gates
    return 3 * 2 * known["tokens"] * known["width"] * products


def triton_variants(target: str) -> list[Variant]:
    """Those of the 1.3B and of the 125M model, and odd ones."""
    precision = "tf32x3" if target.startswith("sm_") else "ieee"
    meta = {"device": "meta"}
    variants = []
    for name, tokens, tiles, tile, gates, dtype in (
        ("1.3b", 8192, 128, 32, 8, torch.bfloat16),
        ("125m", 16384, 48, 32, 8, torch.bfloat16),
        ("narrow", 70, 3, 16, 2, torch.float32),
        ("many gates", 1000, 5, 32, 17, torch.bfloat16),
    ):
        width = tiles * tile
        x = torch.empty(tokens, width, dtype=dtype, **meta)
        x_v = torch.empty(tokens, 2 * width, dtype=dtype, **meta)[:, :width]
        matrices = torch.empty(3, tiles, tile, tile, dtype=dtype, **meta)
        weight = torch.empty(3, width, gates, dtype=dtype, **meta)
        q, k, v, d_qk, d_v = (torch.empty_like(x) for _ in range(5))
        preacts = torch.empty(tokens, gates, **meta)
        inputs = x, x_v, matrices, weight
        forward = plan_forward(*inputs, q, k, v, preacts, precision)
        more = None if name == "narrow" else torch.empty_like(x)
        backward, _, _ = plan_backward(q, k, v, preacts, more, *inputs, d_qk, d_v, precision)
        for launch, phase in ((forward, "fw"), (backward, "bw")):
            variants.append(variant_of(launch, name, phase, flops_of(launch)))
    return variants
