"""MLSTM in chunkwise-parallel form on Triton: custom ops around the launches of `triton_plan`.

As `torch.library` custom ops with fake implementations and registered gradients they work under
torch.compile, FakeTensor and activation recomputation; autocast leaves them alone. They are
deterministic. A second derivative does not exist.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from xlstm_kernels.common import triton_launch
from xlstm_kernels.common.triton_launch import architecture, run_all
from xlstm_kernels.mlstm.triton.launches import (
    Forward,
    Options,
    allocate_forward,
    allocate_gradients,
    plan_backward,
    plan_forward,
    sizes_of,
)
from xlstm_kernels.mlstm.triton.tiles import (
    CHUNK_SIZES,
    MOST_QK,
    MOST_V,
    MlstmConfig,
    mlstm_config,
    pick_chunk_size,
)

State = tuple[Tensor, Tensor, Tensor]


def refusal(
    like: Tensor, *, qk_dim: int, v_dim: int, chunk_size: int | None = None, asked: bool
) -> str | None:
    """Why this backend cannot run such a call, with the remedy; None if it can."""
    reason = triton_launch.refusal(like, asked=asked)
    if reason is not None:
        return reason
    if qk_dim > MOST_QK or v_dim > MOST_V:
        return (
            f"qk_dim={qk_dim}, v_dim={v_dim} exceed {MOST_QK} and {MOST_V}, the largest heads of "
            "the Triton kernels; use more heads, or 'torch'"
        )
    if chunk_size is not None and chunk_size < CHUNK_SIZES[0]:
        return (
            f"chunk_size={chunk_size} is below {CHUNK_SIZES[0]}, the smallest chunk of the Triton "
            f"kernels; use one of {', '.join(map(str, CHUNK_SIZES))}, or 'torch'"
        )
    return None


def make_options(
    arch: str, q: Tensor, v: Tensor, chunk_size: int, exp_gate: bool, normalize: bool, eps: float,
    bf16_states: bool, soft_cap: float | None, tiles: Sequence[int],
) -> Options:  # fmt: skip
    """Options of a call; `tiles` is a flat `MlstmConfig`, or empty for that of the table."""
    config = (
        MlstmConfig.unflat(list(tiles))
        if tiles
        else mlstm_config(arch, q.shape[-1], v.shape[-1], q.dtype, chunk_size, bf16_states)
    )
    precision = "tf32x3" if arch.startswith("sm_") else "ieee"
    return Options(chunk_size, exp_gate, normalize, eps, bf16_states, precision, config, soft_cap)


Tensors11 = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]
Tensors7 = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("xlstm_kernels::mlstm_forward", mutates_args=())
def mlstm_forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    C: Tensor | None, n: Tensor | None, m: Tensor | None, boundaries: Tensor | None,
    chunk_size: int, exp_gate: bool, normalize: bool, eps: float, bf16_states: bool,
    soft_cap: float | None, last: bool, tiles: Sequence[int],
) -> Tensors11:  # fmt: skip
    """The forward pass: the fields of `triton_plan.Forward`."""
    arch = architecture(q.device)
    options = make_options(
        arch, q, v, chunk_size, exp_gate, normalize, eps, bf16_states, soft_cap, tiles
    )  # fmt: skip
    C, n, m = (None if x is None else x.contiguous() for x in (C, n, m))
    out, launches = plan_forward(q, k, v, i, f, C, n, m, boundaries, options, last)
    run_all(launches, q)
    return tuple(out)


@mlstm_forward.register_fake
def _(q, k, v, i, f, C, n, m, boundaries, chunk_size, exp_gate, normalize, eps, bf16_states,
      soft_cap, last, tiles):  # fmt: skip
    z = sizes_of(q, v, chunk_size)
    return tuple(
        allocate_forward(
            q,
            z,
            normalize=normalize,
            bf16_states=bf16_states,
            bounded=boundaries is not None,
            last=last,
        )
    )


@torch.library.custom_op("xlstm_kernels::mlstm_backward", mutates_args=())
def mlstm_backward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    d_h: Tensor, d_last_c: Tensor | None, d_last_n: Tensor | None,
    h: Tensor, gates: Tensor, keep: Tensor, first: Tensor, states: Tensor, n_states: Tensor,
    inverse: Tensor, overlap: Tensor,
    chunk_size: int, exp_gate: bool, normalize: bool, eps: float, bf16_states: bool,
    soft_cap: float | None, tiles: Sequence[int],
) -> Tensors7:  # fmt: skip
    """The backward pass: the fields of `triton_plan.Gradients`."""
    arch = architecture(q.device)
    options = make_options(
        arch, q, v, chunk_size, exp_gate, normalize, eps, bf16_states, soft_cap, tiles
    )  # fmt: skip
    none = h.new_empty(0)
    out = Forward(
        h, none, none, none, gates, keep, first, states, n_states, inverse, overlap
    )  # fmt: skip
    d_last_c, d_last_n = (None if x is None else x.contiguous() for x in (d_last_c, d_last_n))
    grads, launches = plan_backward(q, k, v, i, f, d_h, d_last_c, d_last_n, out, options)
    run_all(launches, q)
    return tuple(grads)


@mlstm_backward.register_fake
def _(q, k, v, i, f, *_):
    return tuple(allocate_gradients(q, v, i, f))


def _save(ctx, inputs, output):
    q, k, v, i, f, C, n, _, _, *options, _, tiles = inputs
    out = Forward(*output)
    ctx.options, ctx.tiles = options, list(tiles)
    ctx.carried = [None if x is None else (x.shape, x.dtype) for x in (C, n)]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(
        q, k, v, i, f, out.h, out.gates, out.keep, out.first, out.states, out.n_states,
        out.inverse, out.overlap,
    )  # fmt: skip


def _gradients(ctx, d_h, d_last_c, d_last_n, *_):
    q, k, v, i, f, *saved = ctx.saved_tensors
    if d_h is None:
        d_h = torch.zeros_like(saved[0])
    grads = mlstm_backward(
        q, k, v, i, f, d_h, d_last_c, d_last_n, *saved, *ctx.options, ctx.tiles
    )  # fmt: skip
    d_state = [
        None if kept is None else grad.view(kept[0]).to(kept[1])
        for kept, grad in zip(ctx.carried, grads[5:], strict=True)
    ]
    return *grads[:5], *d_state, *[None] * 10


mlstm_forward.register_autograd(_gradients, setup_context=_save)


def mlstm_chunkwise_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    initial_state: State | None,
    *,
    chunk_size: int | None,
    return_last_state: bool,
    boundaries: Tensor | None,
    gate: str,
    normalize: bool,
    eps: float,
    gate_soft_cap: float | None = None,
    states_dtype: torch.dtype | None = None,
    tiles: MlstmConfig | None = None,
) -> Tensor | tuple[Tensor, State]:
    """Triton backend of `xlstm_kernels.mlstm_chunkwise` (checked arguments, same meaning).

    States between chunks are kept in `states_dtype`, float32 (None) or bfloat16; they are carried
    in float32. `chunk_size` is rounded down to a power of two, at most 256.
    """
    b, heads, s, qk = q.shape
    C, n, m = initial_state if initial_state is not None else (None, None, None)
    h, last_c, last_n, last_m, *_ = mlstm_forward(
        q, k, v, igate_preact, fgate_preact, C, n, m, boundaries,
        pick_chunk_size(chunk_size, b * heads, s, qk, v.shape[-1]), gate == "exp", normalize, eps,
        states_dtype == torch.bfloat16, gate_soft_cap, return_last_state,
        [] if tiles is None else tiles.flat(),
    )  # fmt: skip
    if not return_last_state:
        return h
    state = (
        last_c.view(b, heads, qk, v.shape[-1]),
        last_n.view(b, heads, qk),
        last_m.view(b, heads),
    )
    return h, state
