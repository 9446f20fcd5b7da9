"""Products of linear layers that share nothing between ranks, and of the gradients' buffers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xlstm_mcore.recompute import run_again

# From the gradient of a function's output, which it may overwrite, and the function's inputs: the
# output, and the gradient of each input.
Again = Callable[..., tuple[Tensor, Sequence[Tensor | None]]]


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


def product_of(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    weight: Tensor,
    into_buffer: bool,
    again: Again | None = None,
) -> Tensor:
    """`function(*inputs) @ weight.T`, of which autograd keeps the inputs and not the operand.

    The backward pass needs the operand for the gradient of the weight, and the function's own
    gradient after that of the operand. Both come from one run of the function, or from one kernel.

    Args:
        function: Cheap, and a function of the tensors alone: it draws no random numbers, and
            parameters are among its inputs. It returns `[tokens, columns]`.
        inputs: Its inputs.
        weight: `[rows, columns]`.
        into_buffer: As of `local_product`.
        again: A kernel for both, or None.
    """
    return _ProductOf.apply(function, again, weight, into_buffer, *inputs)


class _ProductOf(torch.autograd.Function):
    """See `product_of`."""

    @staticmethod
    def forward(ctx, function, again, weight, into_buffer, *inputs):
        ctx.function, ctx.again, ctx.weight = function, again, weight
        ctx.into_buffer = into_buffer and hasattr(weight, "main_grad")
        ctx.save_for_backward(weight, *inputs)
        return torch.mm(function(*inputs), weight.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weight, *inputs = ctx.saved_tensors
        d_x = torch.mm(grad, weight)
        if ctx.again is None:
            x, d_inputs = run_again(ctx.function, inputs, ctx.needs_input_grad[4:], d_x)
        else:
            x, d_inputs = ctx.again(d_x, *inputs)
        d_weight = None
        if ctx.needs_input_grad[2]:
            d_weight = weight_gradient(ctx.weight, grad, x, ctx.into_buffer)
        return None, None, d_weight, None, *d_inputs


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
