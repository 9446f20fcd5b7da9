"""All projections of the 7B-style mixer, side by side, and their gradients in one tensor."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_kernels.common.products import product_in_fp32
from xlstm_mcore.modules.linear import ColumnLinear
from xlstm_mcore.modules.products import weight_gradient


class Heads(NamedTuple):
    """How tokens and heads lie in a projection.

    Attributes:
        batch: Rows of the batch. Tokens are in the order of the sequence, then of the batch.
        count: Heads of each projection.
        dims: Width of a head of each projection; one projection lies behind the other.
    """

    batch: int
    count: int
    dims: tuple[int, ...]


class HeadProjections(ColumnLinear):
    """Several projections by one product, and the gates of the cell by another one in fp32.

    Exponentials of a bf16 pre-activation of 10 would be 3 % off. The tensor cores of a GPU multiply
    bf16 numbers and add in fp32 anyway, so no operand is widened for it.

    All of it is one step for autograd. The gradients of heads are written once, to their places in
    the packed gradient that the product needs; autograd's own views would put each in order first
    and then all side by side. The gradient of the tokens is the sum of two products, of which the
    second adds to the first.
    """

    def forward(
        self, x: Tensor, gate_weight: Tensor, gate_bias: Tensor, heads: Heads
    ) -> tuple[Tensor, ...]:
        """Project tokens.

        Args:
            x: Gathered tokens `[s * b, h]`.
            gate_weight: `[2 * heads, h]`: all input gates, then all forget gates.
            gate_bias: `[2 * heads]`.
            heads: How the projections are split.

        Returns:
            Views `[b, heads, s, dim]`, one for each of `heads.dims`, and the pre-activations
            `[b, heads, s]` of the input gate and of the forget gate in fp32 (fp64 for fp64).
        """
        into_buffer = self.config.gradient_accumulation_fusion
        return _Project.apply(x, self.weight, gate_weight, gate_bias, heads, into_buffer)


class _Project(torch.autograd.Function):
    """See `HeadProjections`."""

    @staticmethod
    def forward(ctx, x, weight, gate_weight, gate_bias, heads, into_buffer):
        ctx.heads, ctx.weight, ctx.bias_dtype = heads, weight, gate_bias.dtype
        ctx.into_buffer = into_buffer and hasattr(weight, "main_grad")
        ctx.save_for_backward(x, weight, gate_weight)
        ctx.set_materialize_grads(False)
        packed = torch.mm(x, weight.t())
        if _is_narrow(x):
            preacts = product_in_fp32(x, gate_weight.t()).add_(gate_bias)
        else:
            preacts = torch.addmm(gate_bias, x, gate_weight.t())
        places = head_places(len(x), heads)
        views = (packed.as_strided(*place) for place in places)
        return *views, *_by_gate(preacts, heads)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        *d_heads, d_igate, d_fgate = grads
        x, weight, gate_weight = ctx.saved_tensors
        d_packed = pack_gradients(d_heads, x, ctx.heads)
        # [s * b, 2 * heads]
        d_preacts = _gate_gradients(d_igate, d_fgate, x, ctx.heads)
        d_bias = d_preacts.sum(0).to(ctx.bias_dtype)
        if _is_narrow(x):  # as the sum of two narrow numbers, which has 16 bits
            high = d_preacts.to(x.dtype)
            d_preacts = torch.cat((high, (d_preacts - high).to(x.dtype)), dim=1)
            d_x = torch.mm(d_preacts, torch.cat((gate_weight, gate_weight)))
            d_gates = product_in_fp32(d_preacts.t(), x).view(2, *gate_weight.shape).sum(0)
            d_gates = d_gates.to(x.dtype)
        else:
            d_x = torch.mm(d_preacts, gate_weight)
            d_gates = torch.mm(d_preacts.t(), x)
        d_x.addmm_(d_packed, weight)
        d_weight = weight_gradient(ctx.weight, d_packed, x, ctx.into_buffer)
        return d_x, d_weight, d_gates, d_bias, None, None


def _is_narrow(x: Tensor) -> bool:
    return x.dtype not in (torch.float32, torch.float64)


def _by_gate(preacts: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """The two halves of `[s * b, 2 * heads]` as `[b, heads, s]`."""
    tokens, width = preacts.shape
    size = heads.batch, heads.count, tokens // heads.batch
    strides = width, 1, heads.batch * width
    igate, fgate = (preacts.as_strided(size, strides, at) for at in (0, heads.count))
    return igate, fgate


def _gate_gradients(
    d_igate: Tensor | None, d_fgate: Tensor | None, x: Tensor, heads: Heads
) -> Tensor:
    """Inverse of `_by_gate`; zeros where there is no gradient."""
    if d_igate is None or d_fgate is None:
        like = d_fgate if d_igate is None else d_igate
        if like is None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            return x.new_zeros(len(x), 2 * heads.count, dtype=dtype)
        d_igate = torch.zeros_like(like) if d_igate is None else d_igate
        d_fgate = torch.zeros_like(like) if d_fgate is None else d_fgate
    both = torch.cat((d_igate, d_fgate), dim=1).permute(2, 0, 1)  # [s, b, 2 * heads]
    return both.reshape(len(x), -1)


def head_places(tokens: int, heads: Heads) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Size, strides and offset of each projection `[b, heads, s, dim]` in `[s * b, width]`."""
    width, places, offset = heads.count * sum(heads.dims), [], 0
    for dim in heads.dims:
        size = heads.batch, heads.count, tokens // heads.batch, dim
        places.append((size, (width, dim, heads.batch * width, 1), offset))
        offset += heads.count * dim
    return places


def pack_gradients(grads: Sequence[Tensor | None], x: Tensor, heads: Heads) -> Tensor:
    """Gradients `[b, heads, s, dim]` side by side, `[s * b, width]`; zeros where there is none.

    Args:
        grads: One for each of `heads.dims`.
        x: The tokens, for their number and dtype.
        heads: How the projections are split.
    """
    packed = x.new_empty(len(x), heads.count * sum(heads.dims))
    for place, grad in zip(head_places(len(x), heads), grads, strict=True):
        view = packed.as_strided(*place)
        if grad is None:
            view.zero_()
        else:
            view.copy_(grad)
    return packed
