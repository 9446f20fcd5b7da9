"""The convolution with q, k, v and gates as one step for autograd, on Triton.

The input has a gradient by the convolution and one by v, the convolved input one by q and k and one
by the skip behind the cell, and the input lies beside the output gate in one tensor, whose gradient
the projection needs whole. Autograd would add each pair and put the halves side by side, in passes
of their own. Here each kernel adds what there is already to what it writes.
"""

import torch
from torch import Tensor

from xlstm_kernels.conv.triton import conv_gradients, conv_triton
from xlstm_kernels.qkv.triton import by_head, gate_columns, project, project_gradients, tokens_of


class _ConvQkv(torch.autograd.Function):
    """See `conv_qkv_and_gates_triton`."""

    @staticmethod
    def forward(ctx, packed, conv_weight, conv_bias, before, boundaries, matrices, columns):
        inner = len(conv_weight)
        x, beside = packed[..., :inner], packed[..., inner:]
        convolved = conv_triton(x, conv_weight, conv_bias, before, boundaries, True)
        results = project(tokens_of(convolved), tokens_of(x), matrices, columns)
        conv = conv_weight, conv_bias, before, boundaries
        ctx.save_for_backward(packed, convolved, *conv, matrices, columns)
        return convolved, beside, *results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_convolved, d_beside, *d_results):
        packed, convolved, weight, bias, before, boundaries, *of_qkv = ctx.saved_tensors
        b, s, inner = convolved.shape
        x = packed[..., :inner]
        d_qk, d_xv, d_matrices, d_columns = project_gradients(
            *d_results, tokens_of(d_convolved), tokens_of(convolved), tokens_of(x), *of_qkv
        )
        d_qk, d_xv = (d.view(s, b, inner).transpose(0, 1) for d in (d_qk, d_xv))
        d_packed, d_weight, d_bias, d_before = conv_gradients(
            d_qk, x, weight, bias, before, boundaries, True, d_xv, d_beside
        )
        d_bias = None if bias is None else d_bias.to(bias.dtype)
        d_before = None if before is None else d_before.to(before.dtype)
        d_qkv = (d.to(x.dtype) for d in (d_matrices, d_columns))
        return d_packed, d_weight.to(weight.dtype), d_bias, d_before, None, *d_qkv


def conv_qkv_and_gates_triton(
    packed: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    before: Tensor | None,
    boundaries: Tensor | None,
    matrices: Tensor,
    gate_weight: Tensor,
    heads: int,
) -> tuple[Tensor, ...]:
    """Triton backend of `xlstm_kernels.conv_qkv_and_gates` (checked arguments, same meaning).

    `before` is the initial state, and `matrices` [3 * tiles, out, in] are the blocks, some joined
    in each tile.
    """
    weights = matrices.unflatten(0, (3, -1)), gate_columns(gate_weight)
    convolved, beside, *results = _ConvQkv.apply(
        packed, conv_weight, conv_bias, before, boundaries, *weights
    )
    return convolved, beside, *by_head(results, len(packed), heads)
