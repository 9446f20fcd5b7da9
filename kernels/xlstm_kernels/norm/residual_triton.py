"""The residual stream and its norm on Triton, by the kernels of `triton`.

The sum that comes before a norm is of the same pass over memory, and so is the sum of the gradients
where a tensor goes on beside its norm.
"""

import torch
from torch import Tensor

from xlstm_kernels.common.triton_launch import run_all
from xlstm_kernels.norm.triton import norm_backward_op, norm_op, plan_forward

__all__ = ["add_norm_triton", "norm_beside_triton"]


@torch.library.custom_op("xlstm_kernels::add_norm_triton", mutates_args=())
def _add_norm(
    x: Tensor, added: Tensor, weight: Tensor, eps: float, centered: bool
) -> tuple[Tensor, Tensor]:
    """x + added, and the norm of its rows."""
    x, added = x.contiguous(), added.contiguous()
    total, y = torch.empty_like(x), torch.empty_like(x)
    weight = weight.contiguous()
    run_all([plan_forward(x, weight, None, y, eps, centered, "row", added, total)], x)
    return total, y


@_add_norm.register_fake
def _(x, added, weight, eps, centered):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))


def _save_sum(ctx, inputs, output):
    _, _, weight, *ctx.options = inputs
    ctx.save_for_backward(output[0], weight)


def _differentiate_sum(ctx, d_total, d_y):
    total, weight = ctx.saved_tensors
    d_x, d_weight = norm_backward_op(d_y, d_total, total, weight, None, *ctx.options, "row")
    return d_x, d_x, d_weight.to(weight.dtype), None, None


_add_norm.register_autograd(_differentiate_sum, setup_context=_save_sum)


class _NormBeside(torch.autograd.Function):
    """See `xlstm_kernels.norm_beside`. A custom op could not return its input."""

    @staticmethod
    def forward(ctx, x, weight, eps, centered):
        ctx.options = eps, centered
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return x, norm_op(x, weight, None, eps, centered, "row")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_total, d_y):
        if d_y is None:
            return d_total, None, None, None
        x, weight = ctx.saved_tensors
        d_x, d_weight = norm_backward_op(d_y, d_total, x, weight, None, *ctx.options, "row")
        return d_x, d_weight.to(weight.dtype), None, None


def norm_beside_triton(x: Tensor, weight: Tensor, kind: str, eps: float) -> tuple[Tensor, Tensor]:
    """Triton backend of `xlstm_kernels.norm_beside` (checked arguments, same meaning)."""
    return _NormBeside.apply(x, weight, eps, kind == "layernorm")


def add_norm_triton(
    x: Tensor, added: Tensor, weight: Tensor, kind: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Triton backend of `xlstm_kernels.add_norm` (checked arguments, same meaning)."""
    return _add_norm(x, added, weight, eps, kind == "layernorm")
