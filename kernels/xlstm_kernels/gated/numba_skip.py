"""The classic mLSTM block's skip and gate on the CPU: one pass forward and one backward."""

import torch
from torch import Tensor

from xlstm_kernels.common.numba.tasks import readable, run_tasks, unsupported_reason

__all__ = ["gated_skip_numba", "unsupported_reason"]

PARTS = 32  # of the rows, with a sum of the skip's gradient each


@torch.library.custom_op("xlstm_kernels::gated_skip_numba", mutates_args=())
def gated_skip_numba(h: Tensor, skip: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """Numba backend of `xlstm_kernels.gated_skip` (checked arguments, same meaning)."""
    from xlstm_kernels.gated import numba_loops

    rows, batch, width = h.shape
    y = h.new_empty(h.shape)
    inputs = [readable(one) for one in (h, x, gate)]
    run_tasks(
        numba_loops.forward_skip, rows, batch, width, *(one.stride()[:2] for one in inputs),
        *inputs, skip.float().contiguous(), y,
    )  # fmt: skip
    return y


@gated_skip_numba.register_fake
def _(h, skip, x, gate):
    return h.new_empty(h.shape)


@torch.library.custom_op("xlstm_kernels::gated_skip_numba_backward", mutates_args=())
def _backward(
    d_y: Tensor, h: Tensor, skip: Tensor, x: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all inputs, those of tokens contiguous."""
    from xlstm_kernels.gated import numba_loops

    rows, batch, width = h.shape
    d_h, d_x, d_gate = (h.new_empty(h.shape) for _ in range(3))
    d_skip = h.new_empty(PARTS, width)
    inputs = [readable(one) for one in (d_y, h, x, gate)]
    run_tasks(
        numba_loops.backward_skip, PARTS, PARTS, rows, batch, width,
        *(one.stride()[:2] for one in inputs), *inputs, skip.float().contiguous(),
        d_h, d_x, d_gate, d_skip,
    )  # fmt: skip
    return d_h, d_skip.sum(0), d_x, d_gate


@_backward.register_fake
def _(d_y, h, skip, x, gate):
    d_h, d_x, d_gate = (h.new_empty(h.shape) for _ in range(3))
    return d_h, h.new_empty(skip.shape), d_x, d_gate


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, d_y):
    return _backward(d_y, *ctx.saved_tensors)


gated_skip_numba.register_autograd(_differentiate, setup_context=_save)
