"""The sLSTM scan as an operator of torch: the signature and the gradient that all backends share.

As `torch.library` custom ops with fake implementations and registered gradients, scans work under
torch.compile, FakeTensor and activation recomputation. The operators take and give flat lists of
tensors. Inside, autocast is off: dtypes are those of the arguments, which products in bfloat16
would undo.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_kernels.common.torch_op import torch_op
from xlstm_kernels.slstm.arguments import State

PartialState = tuple[Tensor | None, ...]
"""A `State` of which any part may be None, which stands for zeros."""


class Results(NamedTuple):
    """What a forward pass returns."""

    out: Tensor  # [b, s, heads, d], h of all steps
    last: State
    saved: list[Tensor]  # what the backward pass of the same backend needs


class Kept(NamedTuple):
    """What a backward pass starts from."""

    recurrent_weight: Tensor  # [4, heads, d_in, d_out]
    h_first: Tensor | None  # [b, heads, d] of the initial state; only if `keeps_output`
    boundaries: Tensor | None  # bool [b, s]
    out: Tensor | None  # `Results.out`; only if `keeps_output`
    saved: list[Tensor]  # `Results.saved`


class Gradients(NamedTuple):
    """What a backward pass returns, in any float dtypes."""

    d_gate_preacts: Tensor
    d_recurrent_weight: Tensor
    d_bias: Tensor
    dh: Tensor  # of the initial state
    dc: Tensor
    dn: Tensor


def scan_operator(
    name: str,
    *,
    forward: Callable[..., Results],
    allocate: Callable[[Tensor, str], Results],
    backward: Callable[..., Gradients],
    allocate_gradients: Callable[[Kept], Gradients],
    keeps_output: bool = False,
) -> torch.library.CustomOpDef:
    """Register the two passes of a backend as `xlstm_kernels::<name>` and `<name>_backward`.

    Args:
        name: Name of the operator.
        forward: From gate_preacts, recurrent_weight, bias, state (`PartialState`), boundaries,
            whether the forget gate is a sigmoid, and the cell (one of `CELLS`).
        allocate: `Results` of the right shapes, dtypes and strides from gate_preacts and cell.
        backward: From `Kept`, d_out (or None), the gradients of h, c and n of the last state (or
            None each), whether the forget gate is a sigmoid, and the cell.
        allocate_gradients: `Gradients` of the right shapes, dtypes and strides from `Kept`.
        keeps_output: Whether the backward pass reads h, which is then kept.

    Returns:
        The operator: (gate_preacts, recurrent_weight, bias, h, c, n, m, boundaries, sigmoid_forget,
        cell) to [out, h, c, n, m, *saved].
    """

    @torch_op(name)
    def scan_forward(
        gate_preacts: Tensor,
        recurrent_weight: Tensor,
        bias: Tensor,
        h: Tensor | None,
        c: Tensor | None,
        n: Tensor | None,
        m: Tensor | None,
        boundaries: Tensor | None,
        sigmoid_forget: bool,
        cell: str,
    ) -> list[Tensor]:
        state = (h, c, n, m)
        tensors = gate_preacts, recurrent_weight, bias
        results = forward(*tensors, state, boundaries, sigmoid_forget, cell)
        return [results.out, *results.last, *results.saved]

    @scan_forward.register_fake
    def _(gate_preacts, *rest):
        results = allocate(gate_preacts, rest[-1])
        return [results.out, *results.last, *results.saved]

    @torch_op(f"{name}_backward")
    def scan_backward(
        recurrent_weight: Tensor,
        h_first: Tensor | None,
        boundaries: Tensor | None,
        out: Tensor | None,
        saved: list[Tensor],
        d_out: Tensor | None,
        d_h: Tensor | None,
        d_c: Tensor | None,
        d_n: Tensor | None,
        sigmoid_forget: bool,
        cell: str,
    ) -> list[Tensor]:
        kept = Kept(recurrent_weight, h_first, boundaries, out, saved)
        return list(backward(kept, d_out, (d_h, d_c, d_n), sigmoid_forget, cell))

    @scan_backward.register_fake
    def _(recurrent_weight, h_first, boundaries, out, saved, *_):
        return list(allocate_gradients(Kept(recurrent_weight, h_first, boundaries, out, saved)))

    def save(ctx, inputs, output):
        _, recurrent_weight, _, h, _, _, _, boundaries, ctx.sigmoid_forget, ctx.cell = inputs
        h, out = (h, output[0]) if keeps_output else (None, None)
        ctx.save_for_backward(recurrent_weight, h, boundaries, out, *output[5:])
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:6]]
        ctx.mark_non_differentiable(*output[4:])
        ctx.set_materialize_grads(False)

    def differentiate(ctx, d_outputs):
        weight, h_first, boundaries, out, *saved = ctx.saved_tensors
        kept = weight, h_first, boundaries, out, saved
        grads = scan_backward(*kept, *d_outputs[:4], ctx.sigmoid_forget, ctx.cell)
        pairs = zip(grads, ctx.dtypes, strict=True)
        return *(grad.to(dtype) if dtype else None for grad, dtype in pairs), *[None] * 4

    scan_forward.register_autograd(differentiate, setup_context=save)
    return scan_forward
