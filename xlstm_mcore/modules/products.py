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


def add_product(target: Tensor, a: Tensor, b: Tensor) -> None:
    """`target += a @ b` in fp32, by one product and without a tensor for its result.

    Args:
        target: fp32 (or fp64) `[m, l]`.
        a: `[m, k]`, narrow or in the dtype of `target`.
        b: `[k, l]`, in the dtype of `a`.
    """
    if a.dtype == target.dtype:
        target.addmm_(a, b)
    elif a.device.type == "cpu":
        target.addmm_(a.to(target.dtype), b.to(target.dtype))
    else:
        torch.addmm(target, a, b, out_dtype=target.dtype, out=target)


def local_product(x: Tensor, weight: Tensor, into_buffer: bool) -> Tensor:
    """`x @ weight.T`, as megatron-core's linear layers compute it where ranks share nothing.

    Args:
        x: `[..., columns]`.
        weight: `[rows, columns]`.
        into_buffer: Whether the gradient of the weight is added to its buffer `main_grad`, which
            DDP makes, by the product itself. Autograd gets a gradient that nobody reads, because
            DDP's hook refuses none when it overlaps the reduction.
    """
    product = _LocalProduct.apply(x if x.dim() == 2 else x.flatten(0, -2), weight, into_buffer)
    return product if x.dim() == 2 else product.view(*x.shape[:-1], -1)


class _LocalProduct(torch.autograd.Function):
    """See `local_product`."""

    @staticmethod
    def forward(ctx, x, weight, into_buffer):
        # Hooks for saved tensors may give back another Python object than the parameter.
        ctx.weight = weight
        ctx.into_buffer = into_buffer and hasattr(weight, "main_grad")
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = torch.mm(grad, weight)
        if ctx.needs_input_grad[1]:
            d_weight = weight_gradient(ctx.weight, grad, x, ctx.into_buffer)
        return d_x, d_weight, None


def weight_gradient(weight: Tensor, grad: Tensor, x: Tensor, into_buffer: bool) -> Tensor | None:
    """`grad.T @ x` for autograd, or added to the weight's buffer; see `local_product`."""
    if not into_buffer:
        return torch.mm(grad.t(), x)
    add_product(weight.main_grad, grad.t(), x)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    # Of tied embeddings DDP's hook adds what autograd has, where the lookup's gradient is.
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight, requires_grad=False)


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
