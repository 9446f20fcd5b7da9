"""SwiGLU and GeGLU: `act(gate) * up`, halves of one tensor (Shazeer 2020, arXiv 2002.05202)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.common.backends import select_backend
from xlstm_kernels.common.checks import check_choice, check_float, check_no_tangents

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}


def gated_activation(gate_up: Tensor, activation: str, *, backend: str | None = None) -> Tensor:
    """`act(gate) * up`, of gate and up side by side.

    Args:
        gate_up: [..., 2 * width]: the gate's half, then the other.
        activation: "silu" (SwiGLU) or "gelu" (GeGLU, with the exact error function).
        backend: "torch", "triton" or "numba"; None for the best one. "triton" computes in float32
            and rounds once; "torch" rounds the activation too.

    Returns:
        [..., width] in the dtype of gate_up.

    Raises:
        ValueError: For wrong shapes, dtypes, devices or options.
        NotImplementedError: For forward-mode differentiation.
    """
    check_float("gate_up", gate_up, gate_up.ndim, "[..., 2 * width]")
    if gate_up.ndim < 1 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"gate_up has shape {list(gate_up.shape)}, but its last axis must hold two halves of "
            "one width; put the gate and the other half side by side"
        )
    check_choice("activation", activation, tuple(ACTIVATIONS))
    check_no_tangents("gated_activation", gate_up)
    chosen = gated_backend(gate_up, activation, backend)
    if chosen == "triton":
        from xlstm_kernels.gated.triton import gated_activation_triton

        return gated_activation_triton(gate_up, activation)
    if chosen == "numba":
        from xlstm_kernels.gated.numba import gated_numba

        return gated_numba(gate_up)
    return _Gated.apply(gate_up, activation)


def gated_activation_again(d_out: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    """The gradient of `gate_up`, and the result of `gated_activation` in place of its gradient.

    It is one Triton kernel, for a backward pass that needs both. Arguments are not checked.

    Args:
        d_out: Gradient of the result, contiguous [rows, width]. It is overwritten by the result.
        gate_up: [rows, 2 * width].
        activation: "silu" or "gelu".

    Returns:
        The gradient of gate_up, in its shape.

    Raises:
        NotImplementedError: For forward-mode differentiation.
    """
    from xlstm_kernels.gated.triton import gated_activation_again_triton

    check_no_tangents("gated_activation_again", d_out, gate_up)
    return gated_activation_again_triton(d_out, gate_up, activation)


def gated_backend(gate_up: Tensor, activation: str, backend: str | None) -> str:
    """Name of the backend that `gated_activation` takes."""
    facts = {"width": gate_up.shape[-1] // 2, "elements": gate_up.numel()}
    return select_backend("gated_activation", backend, gate_up, activation=activation, **facts)


class _Gated(torch.autograd.Function):
    """The PyTorch implementation; the gradients of both halves go straight into one tensor."""

    @staticmethod
    def forward(ctx, gate_up, activation):
        gate, up = gate_up.chunk(2, dim=-1)
        active = ACTIVATIONS[activation](gate)
        ctx.save_for_backward(gate_up, active)
        ctx.activation = activation
        return active * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        gate_up, active = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        torch.mul(d_out, active, out=d_up)
        backward = getattr(torch.ops.aten, f"{ctx.activation}_backward")
        backward.grad_input(d_out * up, gate, grad_input=d_gate)
        return d_gate_up, None
