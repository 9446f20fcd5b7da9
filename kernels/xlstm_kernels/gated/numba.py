"""SwiGLU on the CPU: one pass over memory forward and one backward."""

import torch
from torch import Tensor

from xlstm_kernels.common.numba import tasks
from xlstm_kernels.common.numba.tasks import run_tasks


def unsupported_reason(
    like: Tensor, *, asked: bool, activation: str, width: int, elements: int
) -> str | None:
    """Why this backend cannot run such a call, with the remedy; None if it can."""
    if activation != "silu":
        return f"the compiled loops have silu, not {activation}; use 'torch'"
    return tasks.unsupported_reason(like, asked=asked, width=width, elements=elements)


@torch.library.custom_op("xlstm_kernels::gated_numba", mutates_args=())
def gated_numba(gate_up: Tensor) -> Tensor:
    """Numba backend of `gated_activation` with "silu": [..., 2 * width] -> [..., width]."""
    from xlstm_kernels.gated import numba_loops

    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    run_tasks(numba_loops.forward, out.numel() // width, width, gate_up.contiguous(), out)
    return out


@gated_numba.register_fake
def _(gate_up):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("xlstm_kernels::gated_numba_backward", mutates_args=())
def _backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate_up, both halves in one tensor."""
    from xlstm_kernels.gated import numba_loops

    d_gate_up = gate_up.new_empty(gate_up.shape)
    width = d_out.shape[-1]
    inputs = d_out.contiguous(), gate_up.contiguous()
    run_tasks(numba_loops.backward, d_out.numel() // width, width, *inputs, d_gate_up)
    return d_gate_up


@_backward.register_fake
def _(d_out, gate_up):
    return gate_up.new_empty(gate_up.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, d_out):
    return _backward(d_out, *ctx.saved_tensors)


gated_numba.register_autograd(_differentiate, setup_context=_save)
