"""The mLSTM in chunkwise-parallel form on Triton: custom ops around the launches of `launches`.

As `torch.library` custom ops with fake implementations and registered gradients they work under
torch.compile, FakeTensor and activation recomputation; autocast leaves them alone. They are
deterministic. A second derivative does not exist.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from xlstm_kernels.common import triton_launch
from xlstm_kernels.common.triton_launch import architecture, run_all
from xlstm_kernels.mlstm.arguments import Inputs, State
from xlstm_kernels.mlstm.triton.buffers import (
    Options,
    Saved,
    allocate_forward,
    allocate_gradients,
    sizes_of,
)
from xlstm_kernels.mlstm.triton.launches import plan_backward, plan_forward
from xlstm_kernels.mlstm.triton.tiles import (
    CHUNK_SIZES,
    MOST_QK,
    MOST_V,
    MlstmConfig,
    mlstm_config,
    pick_chunk_size,
)


def unsupported_reason(
    like: Tensor, *, qk_dim: int, v_dim: int, chunk_size: int | None = None, asked: bool
) -> str | None:
    """Why this backend cannot run such a call, with the remedy; None if it can."""
    reason = triton_launch.unsupported_reason(like, asked=asked)
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
    inputs: Inputs,
    chunk_size: int,
    exp_gate: bool,
    normalize: bool,
    eps: float,
    bf16_states: bool,
    soft_cap: float | None,
    tiles: Sequence[int] | None,
) -> Options:
    """`Options` from what a custom op can take.

    `tiles` is a flat `MlstmConfig`, or None for that of the table.
    """
    q, v = inputs.q, inputs.v
    arch = architecture(q.device)
    config = (
        mlstm_config(arch, q.shape[-1], v.shape[-1], q.dtype, chunk_size, bf16_states)
        if tiles is None
        else MlstmConfig.unflat(list(tiles))
    )
    precision = "tf32x3" if arch.startswith("sm_") else "ieee"
    return Options(chunk_size, exp_gate, normalize, eps, bf16_states, precision, config, soft_cap)


@torch.library.custom_op("xlstm_kernels::mlstm_forward", mutates_args=())
def mlstm_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    C: Tensor | None,
    n: Tensor | None,
    m: Tensor | None,
    boundaries: Tensor | None,
    need_last: bool,
    chunk_size: int,
    exp_gate: bool,
    normalize: bool,
    eps: float,
    bf16_states: bool,
    soft_cap: float | None,
    tiles: Sequence[int] | None,
) -> list[Tensor]:
    """The forward pass: see `_as_list`."""
    inputs = Inputs(q, k, v, igate_preact, fgate_preact)
    options = make_options(
        inputs, chunk_size, exp_gate, normalize, eps, bf16_states, soft_cap, tiles
    )
    state = tuple(None if x is None else x.contiguous() for x in (C, n, m))
    *results, launches = plan_forward(inputs, state, boundaries, options, need_last)
    run_all(launches, q)
    return _as_list(*results)


def _as_list(h: Tensor, last: tuple, saved: Saved) -> list[Tensor]:
    """h, the fields of `Saved`, and the last state if it is asked for."""
    return [h, *saved, *(x for x in last if x is not None)]


@mlstm_forward.register_fake
def _(q, k, v, igate, fgate, C, n, m, boundaries, need_last, chunk_size, exp_gate, normalize, eps,
      bf16_states, soft_cap, tiles):  # fmt: skip
    return _as_list(
        *allocate_forward(
            q,
            sizes_of(q, v, chunk_size),
            bf16_states=bf16_states,
            bounded=boundaries is not None,
            need_last=need_last,
        )
    )


@torch.library.custom_op("xlstm_kernels::mlstm_backward", mutates_args=())
def mlstm_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    h: Tensor,
    saved: Sequence[Tensor],
    d_h: Tensor,
    d_C_last: Tensor | None,
    d_n_last: Tensor | None,
    need_state: bool,
    chunk_size: int,
    exp_gate: bool,
    normalize: bool,
    eps: float,
    bf16_states: bool,
    soft_cap: float | None,
    tiles: Sequence[int] | None,
) -> list[Tensor]:
    """The backward pass: the fields of `Gradients`, those of the state if they are asked for."""
    inputs = Inputs(q, k, v, igate_preact, fgate_preact)
    options = make_options(
        inputs, chunk_size, exp_gate, normalize, eps, bf16_states, soft_cap, tiles
    )
    d_last = tuple(None if x is None else x.contiguous() for x in (d_C_last, d_n_last))
    grads, launches = plan_backward(inputs, h, d_h, d_last, Saved(*saved), options, need_state)
    run_all(launches, q)
    return [grad for grad in grads if grad is not None]


@mlstm_backward.register_fake
def _(q, k, v, igate, fgate, h, saved, d_h, d_C_last, d_n_last, need_state, *_):
    grads = allocate_gradients(Inputs(q, k, v, igate, fgate), need_state)
    return [grad for grad in grads if grad is not None]


def _save(ctx, inputs, output):
    *inputs, C, n, _, _, _, chunk_size, exp_gate, normalize, eps, bf16, soft_cap, tiles = inputs
    h, *rest = output
    saved, last_m = rest[: len(Saved._fields)], rest[len(Saved._fields) + 2 :]
    ctx.options = chunk_size, exp_gate, normalize, eps, bf16, soft_cap, tiles
    ctx.state_like = [None if x is None else (x.shape, x.dtype) for x in (C, n)]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved, *last_m)
    ctx.save_for_backward(*inputs, h, *saved)


def _differentiate(ctx, d_outputs):
    d_h, *rest = d_outputs
    d_C_last, d_n_last, _ = rest[len(Saved._fields) :] or (None, None, None)
    q, k, v, igate, fgate, h, *saved = ctx.saved_tensors
    if d_h is None:
        d_h = torch.zeros_like(h)
    need_state = ctx.state_like[0] is not None
    grads = mlstm_backward(
        *(q, k, v, igate, fgate, h), saved, d_h, d_C_last, d_n_last, need_state, *ctx.options
    )
    d_state = [None, None]
    if need_state:
        d_state = [
            grad.view(shape).to(dtype)
            for (shape, dtype), grad in zip(ctx.state_like, grads[5:], strict=True)
        ]
    return *grads[:5], *d_state, *[None] * 10


mlstm_forward.register_autograd(_differentiate, setup_context=_save)


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

    States between chunks are kept in `states_dtype`, float32 or bfloat16 (None: as q); they are
    carried in float32. `chunk_size` is rounded down to a power of two, at most 256.
    """
    b, heads, s, qk_dim = q.shape
    v_dim = v.shape[-1]
    state = (None, None, None) if initial_state is None else initial_state
    options = {
        "chunk_size": pick_chunk_size(chunk_size, b * heads, s, qk_dim, v_dim),
        "exp_gate": gate == "exp",
        "normalize": normalize,
        "eps": eps,
        "bf16_states": (states_dtype or q.dtype) == torch.bfloat16,
        "soft_cap": gate_soft_cap,
        "tiles": None if tiles is None else tiles.flat(),
    }
    inputs = (q, k, v, igate_preact, fgate_preact)
    h, *rest = mlstm_forward(*inputs, *state, boundaries, return_last_state, **options)
    if not return_last_state:
        return h
    C, n, m = rest[-3:]
    return h, (C.view(b, heads, qk_dim, v_dim), n.view(b, heads, qk_dim), m.view(b, heads))
