"""What the sLSTM launches at the sizes of the papers' models, and at awkward sizes."""

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton

from benchmarks.kernel_variants.variant import Variant, variant_of
from xlstm_kernels.common.triton_launch import DTYPES, Launch
from xlstm_kernels.slstm.triton.scan import (
    KEPT,
    kept_buffers,
    plan_backward,
    plan_forward,
    tiles_for,
)
from xlstm_kernels.slstm.triton.step import plan_step

PAPER_HEADS = {"350m": 256, "760m": 384, "1.3b": 512}  # beside 125M: 192; arXiv 2405.04517
BF16, FP32 = torch.bfloat16, torch.float32
STEPS = ((20, FP32), (64, BF16), (192, BF16), (512, BF16), (1024, FP32))


def step_flops(launch: Launch) -> int:
    """Floating-point operations of tensor cores in one time step: four gates of every row."""
    known = launch.arguments
    return 2 * 4 * known["d"] ** 2 * known["batch"] * known["heads"]


def plan_both(
    target: str,
    d: int,
    dtype: torch.dtype,
    *,
    b: int,
    s: int,
    heads: int,
    boundaries: bool = True,
    sigmoid: bool = True,
) -> tuple[Iterator[Launch], Iterator[Launch]]:
    """Launches of a forward and of a backward pass on `target`, planned on the meta device."""
    preacts = torch.empty(b, s, 4, heads, d, dtype=dtype, device="meta")
    weight, bias = preacts.new_empty(4, heads, d, d), preacts.new_empty(4, heads, d)
    starts = preacts.new_empty(b, s, dtype=torch.uint8) if boundaries else None
    states = [preacts.new_empty(b, heads, d, dtype=torch.float32) for _ in range(4)]
    kept = dict(zip(KEPT, kept_buffers(preacts), strict=True))
    out = preacts[:, :, 0].contiguous()
    h = torch.stack([states[0]] * 2) if tiles_for(target, d, dtype).inner else states[0]
    first = h, *states[1:]
    forward = plan_forward(preacts, weight, bias, starts, first, out, kept, sigmoid, target)
    backward = plan_backward(
        out, weight, starts, kept, states[:3], states[3], torch.empty_like(preacts), target
    )
    return forward, backward


def describe(
    target: str,
    d: int,
    dtype: torch.dtype,
    *,
    b: int = 8,
    s: int = 2048,
    heads: int = 4,
    boundaries: bool = True,
    setting: str = "",
    sigmoid: bool = True,
) -> list[Variant]:
    """Variants of a forward and backward pass on `target`."""
    sizes = {"b": b, "s": s, "heads": heads}
    forward, backward = plan_both(target, d, dtype, boundaries=boundaries, sigmoid=sigmoid, **sizes)
    tiles = tiles_for(target, d, dtype)
    variants = []
    for phase, launches, last in (("fw", forward, s), ("bw", backward, s + (tiles.inner > 0))):
        launch = next(iter(launches))
        name = (
            f"{phase} d{d} {str(dtype)[6:]} {'starts' if boundaries else 'whole'} "
            f"{'sigmoid' if sigmoid else 'exp'}{' one head' if heads == 1 else ''}"
            f"{setting and ' ' + setting}"
        )
        steps = 1 if tiles.apart else last
        one = variant_of(launch, name, phase, step_flops(launch) * steps, setting)
        if tiles.inner:
            weight = launch.arguments["weight"]
            matrices = weight.nbytes // heads
            blocks, turns = triton.cdiv(d, tiles.width), triton.cdiv(d, tiles.inner)
            if tiles.apart:  # a launch reads the weights and one token of everything else
                rest = (one.bytes - weight.nbytes) // s
                one = replace(one, count=last, bytes=weight.nbytes + rest)
                matrices, blocks = matrices // blocks, 1
            one = replace(one, inner_loops=(blocks, turns), step_bytes=matrices)
        variants.append(replace(one, steps=steps))
    return variants


def describe_step(target: str, d: int, dtype: torch.dtype) -> Variant:
    """The variant of one decoding step of 16 rows and 4 heads."""
    preacts = torch.empty(16, 4, 4, d, dtype=dtype, device="meta")
    weight, bias = preacts.new_empty(4, 4, d, d), preacts.new_empty(4, 4, d)
    state = [preacts.new_empty(16, 4, d, dtype=torch.float32) for _ in range(4)]
    launch = plan_step(preacts, weight, bias, state, True, target)[2]
    return variant_of(launch, f"d{d} {str(dtype)[6:]}", "step", step_flops(launch))


def triton_variants(target: str) -> list[Variant]:
    """The papers' sizes, then head sizes, dtypes and options, then decoding steps."""
    variants = describe(target, 192, BF16, setting="125m")
    for size, d in PAPER_HEADS.items():
        variants += describe(target, d, BF16, setting=size)
    for dtype in DTYPES:
        for d in (16, 20, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024):
            variants += describe(target, d, dtype)
    for d in (32, 192, 512):
        variants += describe(target, d, BF16, boundaries=False, sigmoid=False)
        variants += describe(target, d, BF16, heads=1)
    return variants + [describe_step(target, d, dtype) for d, dtype in STEPS]
