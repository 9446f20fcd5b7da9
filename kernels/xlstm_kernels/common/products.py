"""Matrix products whose operands are narrow and whose result is fp32.

The tensor cores of a GPU multiply bf16 numbers and add in fp32 anyway: a result in fp32 costs
nothing, and operands in fp32 would cost fifteen times the time. A product of two bf16 numbers is
exact in fp32, so products of widened operands, which the CPU computes, are the same numbers.
"""

import torch
from torch import Tensor


def product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` with sums and result in fp32 (fp64 for fp64 operands).

    Args:
        a: `[m, k]` or `[n, m, k]`.
        b: `[k, l]` or `[n, k, l]`, in the dtype of `a`.
    """
    multiply = torch.mm if a.dim() == 2 else torch.bmm
    if a.dtype in (torch.float32, torch.float64):
        return multiply(a, b)
    if a.device.type == "cpu":
        return multiply(a.float(), b.float())
    return multiply(a, b, out_dtype=torch.float32)


def narrow_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in fp32 of narrow operands, with gradients that lose nothing to their width.

    Operands and shapes are those of `product_in_fp32`. The gradient of the product is fp32. It
    enters the products of the backward pass as the sum of two narrow numbers, which has 16 bits.
    """
    if a.dtype in (torch.float32, torch.float64):
        return torch.matmul(a, b)
    return _NarrowProduct.apply(a, b)


class _NarrowProduct(torch.autograd.Function):
    """See `narrow_product`."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return product_in_fp32(a, b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        high = grad.to(a.dtype)
        both = torch.cat((high, (grad - high).to(a.dtype)), dim=-1)
        d_a = torch.matmul(both, torch.cat((b, b), dim=-1).mT)
        d_b = product_in_fp32(a.mT, both)
        width = b.shape[-1]
        return d_a, (d_b[..., :width] + d_b[..., width:]).to(b.dtype)
