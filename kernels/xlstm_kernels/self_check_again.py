"""Do gradients that leave the result beside them compute what they should on this device?

A comparison as in `self_check`, for kernels that only backward passes run.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from xlstm_kernels.gated.gated import gated_activation_again
from xlstm_kernels.norm.norm import multihead_norm_again
from xlstm_kernels.norm.skip import norm_gated_skip_again
from xlstm_kernels.self_check import compare


def gated_again(activation: str) -> Callable[..., Sequence[Tensor]]:
    """`gated_activation_again` as `compare_again` takes it."""
    return lambda d_out, x: (gated_activation_again(d_out, x, activation),)


def norm_again(heads: int, width: int, kind: str, eps: float) -> Callable[..., Sequence[Tensor]]:
    """`multihead_norm_again` of tensors `[s, heads * width]`, as `compare_again` takes it."""

    def again(d_y: Tensor, x: Tensor, weight: Tensor, gate: Tensor) -> list[Tensor]:
        x, gate = (t.unflatten(-1, (heads, width)).transpose(0, 1)[None] for t in (x, gate))
        d_x, d_weight, d_gate = multihead_norm_again(d_y, x, weight, kind, eps, gate)
        d_x, d_gate = (d[0].transpose(0, 1).flatten(1) for d in (d_x, d_gate))
        return [d_x, d_weight, d_gate]

    return again


def norm_skip_again(heads: int, kind: str, eps: float) -> Callable[..., Sequence[Tensor]]:
    """`norm_gated_skip_again` of tensors `[s, heads * width]`, as `compare_again` takes it."""

    def again(
        d_y: Tensor, h: Tensor, weight: Tensor, skip: Tensor, x: Tensor, gate: Tensor
    ) -> list[Tensor]:
        h = h.unflatten(1, (heads, -1)).transpose(0, 1)[None]
        given = h, weight, kind, eps, skip, x[:, None], gate[:, None]
        d_h, d_weight, d_skip, d_x, d_gate = norm_gated_skip_again(d_y[:, None], *given)
        return [d_h[0].transpose(0, 1).flatten(1), d_weight, d_skip, d_x[:, 0], d_gate[:, 0]]

    return again


class _Again(torch.autograd.Function):
    """A kernel, and another one that has its gradients and its result in the backward pass."""

    @staticmethod
    def forward(ctx, kernel, again, probe, *inputs):
        ctx.again = again
        ctx.save_for_backward(*inputs)
        return kernel(*inputs)

    @staticmethod
    def backward(ctx, d_result):
        result = d_result.clone()  # which is overwritten
        gradients = ctx.again(result, *ctx.saved_tensors)
        return None, None, d_result * result, *gradients


def compare_again(
    name: str,
    kernel: Callable[..., Tensor],
    again: Callable[..., Sequence[Tensor]],
    reference: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    device: torch.device | str,
    dtype: torch.dtype,
) -> list[str]:
    """As `compare`; the result that `again` leaves is the gradient of a factor `1 + probe`."""

    def with_probe(probe: Tensor, *given: Tensor) -> Tensor:
        result = reference(*given)
        return result + probe * result.detach()

    result = torch.empty_like(kernel(*(x.to(device) for x in inputs.values())), device="cpu")
    inputs = {"the result that is left": torch.zeros_like(result), **inputs}
    run = partial(_Again.apply, kernel, again)
    return compare(name, run, with_probe, inputs, device, dtype, "result")
