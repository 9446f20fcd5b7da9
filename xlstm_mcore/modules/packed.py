"""Several projections side by side in one tensor, and their gradients in one tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor


def split_heads(packed: Tensor, heads: int, dims: Sequence[int]) -> tuple[Tensor, ...]:
    """The projections in one tensor, each by heads.

    The gradients come by heads too. Each is written once, to its place in the packed gradient that
    the product of all projections needs. Autograd's own views would put each in order first, and
    then all side by side.

    Args:
        packed: `[s, b, heads * sum(dims)]`.
        heads: Number of heads of each projection.
        dims: Width of a head of each projection.

    Returns:
        Views `[b, heads, s, dim]`, one for each of `dims`.
    """
    return _SplitHeads.apply(packed, heads, dims)


class _SplitHeads(torch.autograd.Function):
    """See `split_heads`."""

    @staticmethod
    def forward(ctx, packed, heads, dims):
        ctx.shape, ctx.heads, ctx.dims = packed.shape, heads, dims
        ctx.set_materialize_grads(False)
        return _views(packed, heads, dims)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        like = next(grad for grad in grads if grad is not None)
        d_packed = like.new_empty(ctx.shape)
        for place, grad in zip(_views(d_packed, ctx.heads, ctx.dims), grads, strict=True):
            if grad is None:
                place.zero_()
            else:
                place.copy_(grad)
        return d_packed, None, None


def _views(packed: Tensor, heads: int, dims: Sequence[int]) -> tuple[Tensor, ...]:
    s, b, _ = packed.shape
    over_s, over_b, unit = packed.stride()
    offset, found = packed.storage_offset(), []
    for dim in dims:
        strides = over_b, dim * unit, over_s, unit
        found.append(packed.as_strided((b, heads, s, dim), strides, offset))
        offset += heads * dim * unit
    return tuple(found)
