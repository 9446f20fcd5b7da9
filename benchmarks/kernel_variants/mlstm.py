"""What the mLSTM launches at the sizes of the papers' models, and at awkward sizes."""

import torch

from benchmarks.kernel_variants.variant import Variant, variant_of
from xlstm_kernels.common.triton_launch import Launch
from xlstm_kernels.mlstm.arguments import Inputs
from xlstm_kernels.mlstm.triton.buffers import Options
from xlstm_kernels.mlstm.triton.gates import gate_gradients_kernel, gates_kernel
from xlstm_kernels.mlstm.triton.gradients import query_key_gradients_kernel, target_gradients_kernel
from xlstm_kernels.mlstm.triton.launches import plan_backward, plan_forward
from xlstm_kernels.mlstm.triton.outputs import outputs_kernel
from xlstm_kernels.mlstm.triton.states import states_kernel
from xlstm_kernels.mlstm.triton.step import plan_step, step_kernel, step_normalizer_kernel
from xlstm_kernels.mlstm.triton.tiles import mlstm_config, pick_chunk_size


def plan(
    target: str,
    *,
    b: int,
    heads: int,
    s: int,
    qk: int,
    v: int,
    dtype: torch.dtype = torch.bfloat16,
    chunk: int | None = None,
    gate: str = "exp",
    normalize: bool = True,
    boundaries: bool = False,
    carried: bool = False,
    bf16_states: bool = False,
    soft_cap: float | None = None,
) -> list[Launch]:
    """All launches of one forward and backward pass on `target`, on the meta device."""
    new = {"device": "meta"}
    q = torch.empty(b, heads, s, qk, dtype=dtype, **new)
    value = torch.empty(b, heads, s, v, dtype=dtype, **new)
    gates = torch.empty(b, heads, s, **new)
    starts = torch.empty(b, s, dtype=torch.bool, **new) if boundaries else None
    C, n, m, dC, dn = [None] * 5
    if carried:
        C, dC = (torch.empty(b, heads, qk, v, **new) for _ in range(2))
        n, dn = (torch.empty(b, heads, qk, **new) for _ in range(2))
        m = torch.empty(b, heads, **new)
    L = pick_chunk_size(chunk, b * heads, s, qk, v)
    options = Options(
        chunk_size=L,
        exp_gate=gate == "exp",
        normalize=normalize,
        eps=1e-6,
        bf16_states=bf16_states,
        precision="tf32x3" if target.startswith("sm_") else "ieee",
        tiles=mlstm_config(target, qk, v, dtype, L, bf16_states),
        soft_cap=soft_cap,
    )
    inputs = Inputs(q, torch.empty_like(q), value, gates, gates.clone())
    h, _, saved, forward = plan_forward(inputs, (C, n, m), starts, options, carried)
    _, backward = plan_backward(
        inputs, h, torch.empty_like(value), (dC, dn), saved, options, carried
    )
    return forward + backward


def plan_one_step(
    *,
    b: int,
    heads: int,
    qk: int,
    v: int,
    dtype: torch.dtype = torch.bfloat16,
    gate: str = "exp",
    soft_cap: float | None = None,
) -> list[Launch]:
    """The launches of one decoding step, on the meta device."""
    new = {"device": "meta"}
    q = torch.empty(b, heads, qk, dtype=dtype, **new)
    value = torch.empty(b, heads, v, dtype=dtype, **new)
    igate, m = (torch.empty(b, heads, **new) for _ in range(2))
    C, n = torch.empty(b, heads, qk, v, **new), torch.empty(b, heads, qk, **new)
    inputs = Inputs(q, torch.empty_like(q), value, igate, igate.clone())
    return plan_step(inputs, (C, n, m), gate, True, 1e-6, soft_cap)[1]


SEVEN = {"b": 1, "heads": 8, "s": 8192, "qk": 256, "v": 512, "soft_cap": 15.0}
SETTINGS = {
    "7b": SEVEN | {"bf16_states": True},
    "7b fp32 states": SEVEN,
    "125m": {"b": 8, "heads": 4, "s": 2048, "qk": 384, "v": 384},
}
BF16, FP32 = {"dtype": torch.bfloat16}, {"dtype": torch.float32}
ODD = {"b": 1, "heads": 2, "s": 1000}
EVEN = {"b": 1, "heads": 1, "s": 32768}
SEEN = {"boundaries": True, "carried": True}
OTHERS = {
    "smallest": ODD | BF16 | {"qk": 16, "v": 16, "chunk": 64},
    "smallest fp32": ODD | FP32 | {"qk": 16, "v": 16, "chunk": 16} | SEEN,
    "32 64 sigmoid": ODD
    | BF16
    | {"qk": 32, "v": 64, "chunk": 64, "gate": "sigmoid"}
    | SEEN
    | {"soft_cap": 15.0},
    "96 192": ODD | BF16 | {"qk": 96, "v": 192, "chunk": 128} | SEEN,
    "96 192 fp32": ODD | FP32 | {"qk": 96, "v": 192, "chunk": 64},
    "64 64 bare": EVEN | BF16 | {"qk": 64, "v": 64, "chunk": 256, "normalize": False},
    "128 128 fp32": EVEN | FP32 | {"qk": 128, "v": 128, "chunk": 128, "gate": "sigmoid"},
    "128 256": {"b": 8, "heads": 16, "s": 8192, "qk": 128, "v": 256} | BF16,
    "256 512 one head": EVEN | BF16 | {"qk": 256, "v": 512, "bf16_states": True},
    "256 512 fp32": EVEN | FP32 | {"qk": 256, "v": 512} | SEEN,
    "512 1024": ODD | BF16 | {"qk": 512, "v": 1024} | SEEN,
    "1.3b": {"b": 4, "heads": 4, "s": 2048, "qk": 1024, "v": 1024} | BF16 | SEEN,
    "512 1024 fp32": ODD | FP32 | {"qk": 512, "v": 1024, "chunk": 256, "normalize": False} | SEEN,
}
STEPS = {
    "decode 7b": {"b": 16, "heads": 8, "qk": 256, "v": 512, "soft_cap": 15.0},
    "decode 96 192 fp32": FP32 | {"b": 1, "heads": 2, "qk": 96, "v": 192, "gate": "sigmoid"},
}


def phase_of(launch: Launch) -> str:
    """Which part of a pass a launch belongs to: "gates", "fw", "bw" or "step"."""
    if launch.kernel in (gates_kernel, gate_gradients_kernel):
        return "gates"
    if launch.kernel in (step_kernel, step_normalizer_kernel):
        return "step"
    gradients = (target_gradients_kernel, query_key_gradients_kernel)
    backward = launch.kernel in gradients or launch.arguments["BACKWARD"]
    return "bw" if backward else "fw"


def flops_of(launch: Launch) -> int:
    """Floating-point operations of tensor cores in one launch."""
    known = launch.arguments
    of_pairs = outputs_kernel, target_gradients_kernel, query_key_gradients_kernel
    if launch.kernel not in (states_kernel, *of_pairs):
        return 0
    tokens, qk, v, L = known["plane"], known.get("QK", 0), known["V"], known["L"]
    with_states = 2 * tokens * qk * v  # one product between all tokens and a state
    if launch.kernel is states_kernel:
        return with_states
    # A product over all causal pairs of tiles in all chunks, for one unit of depth.
    tile, x_tiles = known["BT"], known.get("x_tiles", 1)
    tiles = L // tile
    pairs = 2 * (tokens // L) * tiles * (tiles + 1) // 2 * tile * tile
    if launch.kernel is target_gradients_kernel:
        return pairs * v if known["d_pairs"] is not None else 0
    if launch.kernel is outputs_kernel:
        return with_states + pairs * (x_tiles * qk + v)
    computed = v * x_tiles if known["d_pairs"] is None else 0
    return 2 * with_states + 2 * pairs * (computed + qk)


def triton_variants(target: str) -> list[Variant]:
    """All launches of the settings that are reported, and of others that are only compiled."""
    planned = [(name, name, plan(target, **setting)) for name, setting in SETTINGS.items()]
    planned += [(name, "", plan(target, **setting)) for name, setting in OTHERS.items()]
    planned += [(name, "", plan_one_step(**setting)) for name, setting in STEPS.items()]
    return [
        variant_of(one, f"mlstm {name}", phase_of(one), flops_of(one), setting)
        for name, setting, launches in planned
        for one in launches
    ]
