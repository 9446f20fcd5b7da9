"""The causal convolution with its activation on the CPU: one pass forward and one backward."""

import torch
from torch import Tensor

from xlstm_kernels.common.numba import tasks
from xlstm_kernels.common.numba.tasks import readable, run_tasks


def unsupported_reason(
    like: Tensor, *, asked: bool, state: bool, width: int, elements: int
) -> str | None:
    """Why this backend cannot run such a call, with the remedy; None if it can."""
    if state:
        return "the compiled loops start without a state; use 'torch'"
    return tasks.unsupported_reason(like, asked=asked, width=width, elements=elements)


@torch.library.custom_op("xlstm_kernels::conv_numba", mutates_args=())
def conv_numba(
    x: Tensor, weight: Tensor, bias: Tensor | None, boundaries: Tensor | None, silu: bool
) -> Tensor:
    """Numba backend of `causal_conv1d` without a state: [b, s, c] -> [b, s, c].

    The result has its tokens in the order in which those of x lie in memory.
    """
    from xlstm_kernels.conv import numba_loops

    x = readable(x)
    y = torch.empty_like(x)
    shapes, inputs = _prepared(x, weight, bias, boundaries, silu)
    run_tasks(numba_loops.forward, _tasks(x), *shapes, y.stride()[:2], *inputs, y)
    return y


@conv_numba.register_fake
def _(x, weight, bias, boundaries, silu):
    return torch.empty_like(readable(x))


@torch.library.custom_op("xlstm_kernels::conv_numba_backward", mutates_args=())
def _backward(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    boundaries: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    from xlstm_kernels.conv import numba_loops

    b, _, c = x.shape
    x, d_y = readable(x), readable(d_y)
    d_x, d_bias = torch.empty_like(x), x.new_empty(b, c)
    d_taps = x.new_empty(b, weight.shape[1], c)
    shapes, inputs = _prepared(x, weight, bias, boundaries, silu)
    run_tasks(
        numba_loops.backward, _tasks(x), *shapes, d_y.stride()[:2], d_x.stride()[:2],
        d_y, *inputs, d_x, d_taps, d_bias,
    )  # fmt: skip
    return d_x, d_taps.sum(0).t().contiguous(), d_bias.sum(0)


@_backward.register_fake
def _(d_y, x, weight, bias, boundaries, silu):
    d_x = torch.empty_like(readable(x))
    return d_x, x.new_empty(weight.shape), x.new_empty(x.shape[2])


def _tasks(x: Tensor) -> int:
    from xlstm_kernels.conv.numba_loops import BLOCK

    return x.shape[0] * -(-x.shape[2] // BLOCK)


def _prepared(
    x: Tensor, weight: Tensor, bias: Tensor | None, boundaries: Tensor | None, silu: bool
) -> tuple[tuple, tuple]:
    """What both loops take before their results: numbers, then tensors."""
    b, s, c = x.shape
    bias = x.new_zeros(c) if bias is None else bias.float().contiguous()
    if boundaries is None:
        starts = torch.zeros(b, s, dtype=torch.uint8)
    else:
        starts = boundaries.contiguous().view(torch.uint8)
    taps = weight.float().t().contiguous()
    return (s, c, weight.shape[1], silu, x.stride()[:2]), (x, taps, bias, starts)


def _save(ctx, inputs, output):
    x, weight, bias, boundaries, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, boundaries)


def _differentiate(ctx, d_y):
    x, weight, bias, boundaries = ctx.saved_tensors
    d_x, d_weight, d_bias = _backward(d_y, x, weight, bias, boundaries, ctx.silu)
    d_bias = None if bias is None else d_bias.to(bias.dtype)
    return d_x, d_weight.to(weight.dtype), d_bias, None, None


conv_numba.register_autograd(_differentiate, setup_context=_save)
