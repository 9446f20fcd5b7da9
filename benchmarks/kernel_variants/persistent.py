"""The launches of the persistent sLSTM, which runs where `memory.slstm_form` asks for it.

They are not a part of the default report:

    python -m benchmarks.kernel_resources --all --module benchmarks.kernel_variants.persistent
"""

from dataclasses import replace

import torch

from benchmarks.compiled.aot import DEVICES
from benchmarks.kernel_variants.slstm import step_flops
from benchmarks.kernel_variants.variant import Variant, variant_of
from xlstm_kernels.common.device_limits import Device
from xlstm_kernels.slstm.triton.persistent_group import plan_group
from xlstm_kernels.slstm.triton.persistent_plan import plan_backward, plan_forward
from xlstm_kernels.slstm.triton.scan import KEPT, kept_buffers

SIZES = {
    target: Device(DEVICES[target].processors, DEVICES[target].shared - DEVICES[target].reserved)
    for target in ("sm_80", "sm_90", "sm_100")
}
# Heads and their width: 125M, 350M, 760M, 1.3B, and wider ones. Any other width is compiled as the
# next power of two.
HEADS = ((4, 192), (4, 256), (4, 384), (4, 512), (2, 768), (2, 1024))


def describe(target: str, heads: int, d: int, b: int = 16, s: int = 2048) -> list[Variant]:
    """Variants of both passes in bf16 with boundaries; none where the call does not fit."""
    group = plan_group(b, heads, d, SIZES[target])
    if group is None:
        return []
    preacts = torch.empty(b, s, 4, heads, d, dtype=torch.bfloat16, device="meta")
    weight, bias = preacts.new_empty(4, heads, d, d), preacts.new_empty(4, heads, d)
    starts = preacts.new_empty(b, s, dtype=torch.uint8)
    states = [preacts.new_empty(b, heads, d, dtype=torch.float32) for _ in range(4)]
    kept = dict(zip(KEPT, kept_buffers(preacts), strict=True))
    out = preacts[:, :, 0].contiguous()
    where = target, group
    forward = plan_forward(preacts, weight, bias, starts, states, out, kept, True, *where)
    backward = plan_backward(
        out, weight, starts, kept, states[:3], torch.empty_like(preacts), *where
    )
    variants = []
    for phase, launches in (("fw", forward), ("bw", backward)):
        launch = next(iter(launches))
        flops = s * step_flops(launch)
        one = variant_of(launch, f"{phase} d{d}", phase, flops, f"persistent {d}")
        variants.append(replace(one, steps=s))
    return variants


def triton_variants(target: str) -> list[Variant]:
    """Those of NVIDIA's targets."""
    if target not in SIZES:
        return []
    return [one for heads, d in HEADS for one in describe(target, heads, d)]
