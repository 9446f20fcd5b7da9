"""The mLSTM in chunkwise-parallel form with torch operations, forward and backward by hand.

Inside a chunk of L tokens the cell is a decay-weighted L x L attention; chunks exchange states
(C, n), and all states follow from one chunk-by-chunk matrix of decays, so that there is no loop
over chunks. Products are batched over b * heads * chunks.

What the gates decide is known before the first product (`decays`), so nothing is rescaled.
Gradients of the forget gate add up exactly the pairs (source before t, target at or after t),
without the cancellation of the usual reversed cumulative sum of q.dq - k.dk.

This module has the operators of torch, which take and give flat lists of tensors; `passes` has the
computation.
"""

import torch
from torch import Tensor

from xlstm_kernels.common.torch_op import torch_op
from xlstm_kernels.mlstm.arguments import Gradients, Inputs, State
from xlstm_kernels.mlstm.torch.passes import (
    Options,
    Saved,
    allocate_forward,
    allocate_gradients,
    backward_pass,
    cut,
    forward_pass,
)

BLOCK_NUMBERS = 1 << 19  # in the largest array of one block and thread: 2 MB


def mlstm_chunkwise_torch(
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
    states_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, State]:
    """Torch backend of `xlstm_kernels.mlstm_chunkwise` (checked arguments, same meaning)."""
    inputs = Inputs(q, k, v, igate_preact, fgate_preact)
    state = (None, None, None) if initial_state is None else initial_state
    chunk_size = chunk_size or _default_chunk_size(q.shape[-1], v.shape[-1])
    options = Options(gate == "exp", normalize, eps)
    bf16_states = states_dtype == torch.bfloat16
    h, *last = mlstm_forward(
        *inputs, *state, boundaries, chunk_size, return_last_state, bf16_states, *options
    )
    return (h, tuple(last[:3])) if return_last_state else h


def _default_chunk_size(qk_dim: int, v_dim: int) -> int:
    """Fastest of 32, 64, 128 measured on a CPU: small heads make states cheap, pairs dear."""
    return 32 if qk_dim * v_dim < 64 * 64 else 64


def _blocks(q: Tensor, v: Tensor, chunks: int) -> list[slice]:
    """The b * heads rows in blocks that are worked off one after the other.

    On a CPU the first touch of fresh memory costs as much as a product with it. Arrays of one
    block are small enough to stay in the cache and to be used again by the next.
    """
    b, heads, s, qk_dim = q.shape
    rows, v_dim = b * heads, v.shape[-1]
    at_once = rows
    if q.device.type == "cpu":
        largest = max(s * max(qk_dim, v_dim), chunks * qk_dim * v_dim)
        at_once = min(rows, max(1, BLOCK_NUMBERS * torch.get_num_threads() // largest))
    return [slice(first, min(first + at_once, rows)) for first in range(0, rows, at_once)]


def _rows(x: Tensor | None) -> Tensor | None:
    """[b, heads, ...] as [b * heads, ...]; None and empty tensors as they are."""
    return x if x is None or x.numel() == 0 else x.flatten(0, 1)


def _take(x: Tensor | None, block: slice) -> Tensor | None:
    """The rows `block` of a tensor; None and empty tensors as they are."""
    return x if x is None or x.numel() == 0 else x[block]


@torch_op("mlstm_torch")
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
    chunk_size: int,
    need_last: bool,
    bf16_states: bool,
    exp_gate: bool,
    normalize: bool,
    eps: float,
) -> list[Tensor]:
    """The forward pass: h, the last state (C, n, m), and the fields of `Saved`."""
    heads = q.shape[1]
    options = Options(exp_gate, normalize, eps)
    h, last, saved = allocate_forward(q, v, chunk_size, need_last, bf16_states)
    inputs = [_rows(x) for x in (q, k, v, igate_preact, fgate_preact)]
    state = [_rows(x) for x in (C, n, m)]
    starts = None if boundaries is None else boundaries.repeat_interleave(heads, 0)
    last_rows = [_rows(x) for x in last]
    for block in _blocks(q, v, cut(q.shape[2], chunk_size)[0]):
        forward_pass(
            Inputs(*(_take(x, block) for x in inputs)),
            None if C is None else tuple(_take(x, block) for x in state),
            _take(starts, block),
            options,
            _rows(h)[block],
            tuple(_take(x, block) for x in last_rows),
            Saved(*(_take(x, block) for x in saved)),
        )
    return [h, *last, *saved]


@mlstm_forward.register_fake
def _(q, k, v, igate, fgate, C, n, m, boundaries, chunk_size, need_last, bf16_states, *options):
    h, last, saved = allocate_forward(q, v, chunk_size, need_last, bf16_states)
    return [h, *last, *saved]


@torch_op("mlstm_torch_backward")
def mlstm_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    h: Tensor,
    saved: list[Tensor],
    d_h: Tensor,
    d_C_last: Tensor | None,
    d_n_last: Tensor | None,
    need_state: bool,
    exp_gate: bool,
    normalize: bool,
    eps: float,
) -> list[Tensor]:
    """The backward pass: `Gradients`, with those of C and n only if `need_state`."""
    inputs = Inputs(q, k, v, igate_preact, fgate_preact)
    options = Options(exp_gate, normalize, eps)
    saved = Saved(*saved)
    grads = allocate_gradients(inputs, need_state)
    inputs, results = [_rows(x) for x in inputs], [_rows(x) for x in grads]
    h, d_h, d_C_last, d_n_last = (_rows(x) for x in (h, d_h, d_C_last, d_n_last))
    for block in _blocks(q, v, saved.weights.shape[1]):
        backward_pass(
            Inputs(*(_take(x, block) for x in inputs)),
            h[block],
            d_h[block],
            (_take(d_C_last, block), _take(d_n_last, block)),
            options,
            Saved(*(_take(x, block) for x in saved)),
            Gradients(*(_take(x, block) for x in results)),
        )
    return [x for x in grads if x is not None]


@mlstm_backward.register_fake
def _(q, k, v, igate, fgate, h, saved, d_h, d_C_last, d_n_last, need_state, *options):
    grads = allocate_gradients(Inputs(q, k, v, igate, fgate), need_state)
    return [x for x in grads if x is not None]


def _save(ctx, inputs, output):
    *inputs, C, n, _, _, _, need_last, _, exp_gate, normalize, eps = inputs
    h, C_last, n_last, m_last, *saved = output
    ctx.save_for_backward(*inputs, h, *saved)
    ctx.options = Options(exp_gate, normalize, eps)
    ctx.state_dtypes = None if C is None else (C.dtype, n.dtype)
    empty = () if need_last else (C_last, n_last)
    ctx.mark_non_differentiable(*empty, m_last, *saved)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_outputs):
    d_h, d_C_last, d_n_last, *_ = d_outputs
    q, k, v, igate, fgate, h, *saved = ctx.saved_tensors
    if d_h is None:
        d_h = torch.zeros_like(h)
    need_state = ctx.state_dtypes is not None
    grads = mlstm_backward(
        *(q, k, v, igate, fgate, h), saved, d_h, d_C_last, d_n_last, need_state, *ctx.options
    )
    if need_state:
        grads[5:] = [x.to(dtype) for x, dtype in zip(grads[5:], ctx.state_dtypes, strict=True)]
    else:
        grads += [None, None]
    return *grads, *[None] * 8


mlstm_forward.register_autograd(_differentiate, setup_context=_save)
