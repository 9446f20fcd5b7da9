"""Short causal depthwise convolution over time, with state and document boundaries."""

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from xlstm_kernels.common.backends import select_backend
from xlstm_kernels.common.checks import (
    check_boundaries,
    check_choice,
    check_float,
    check_like,
    check_no_tangents,
    compute_dtype,
)
from xlstm_kernels.common.torch_op import torch_op


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    activation: str | None = None,
    boundaries: Tensor | None = None,
    return_last_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution: y_t = sum_j weight[:, j] x_{t - width + 1 + j} + bias.

    Args:
        x: [b, s, c].
        weight: [c, width].
        bias: [c] or None.
        initial_state: The inputs before x, oldest first, [b, c, width - 1]. None means zeros.
        activation: None or "silu", of y.
        boundaries: bool [b, s], True at the first token of a document: no tap reaches across it,
            and the returned state has zeros for what lies before the last one.
        return_last_state: Whether the state after x is returned as well; its gradient is exact.
        backend: "torch", "triton" or "numba"; None for the best one.

    Returns:
        y [b, s, c] in the dtype of x; with `return_last_state` (y, state [b, c, width - 1]).

    Raises:
        ValueError: For wrong shapes, dtypes, devices or options.
        NotImplementedError: For forward-mode differentiation.
    """
    check_conv_arguments(x, weight, bias, initial_state, boundaries)
    check_choice("activation", activation, (None, "silu"))
    width, silus = weight.shape[1], activation == "silu"
    chosen = conv_backend(x, initial_state, backend)
    if chosen == "triton":
        from xlstm_kernels.conv.triton import conv_triton

        y = conv_triton(x, weight, bias, initial_state, boundaries, silus)
    elif chosen == "numba":
        from xlstm_kernels.conv.numba import conv_numba

        y = conv_numba(x, weight, bias, boundaries, silus)
    else:
        document = None
        if boundaries is not None:  # number of the document that each padded row belongs to
            document = pad(boundaries.cumsum(1), (width - 1, 0))
        padded = torch.cat([_inputs_before(x, initial_state, width), x], 1)
        y = conv_taps(padded, weight, bias, document).to(x.dtype)
        y = silu(y) if silus else y
    return (y, _last_state(x, initial_state, boundaries, width)) if return_last_state else y


def check_conv_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    boundaries: Tensor | None,
) -> None:
    """Raise for what `causal_conv1d` cannot take."""
    check_no_tangents("causal_conv1d", x, weight, bias, initial_state)
    check_float("x", x, 3, "[b, s, c]")
    b, s, c = x.shape
    check_float("weight", weight, 2, "[c, width]")
    width = weight.shape[1]
    check_like("weight", weight, (c, width), "[c, width]", x)
    if bias is not None:
        check_like("bias", bias, (c,), "[c]", x)
    if initial_state is not None:
        check_like("initial_state", initial_state, (b, c, width - 1), "[b, c, width - 1]", x)
    check_boundaries(boundaries, b, s, x)


def conv_backend(x: Tensor, initial_state: Tensor | None, backend: str | None) -> str:
    """Name of the backend that `causal_conv1d` of x [b, s, c] takes."""
    facts = {"width": x.shape[2], "elements": x.numel()}
    return select_backend("causal_conv1d", backend, x, state=initial_state is not None, **facts)


def _inputs_before(x: Tensor, initial_state: Tensor | None, width: int) -> Tensor:
    """The inputs before x, oldest first, [b, width - 1, c]."""
    if initial_state is None:
        return x.new_zeros(x.shape[0], width - 1, x.shape[2])
    return initial_state.transpose(1, 2).to(x.dtype)


def _last_state(
    x: Tensor, initial_state: Tensor | None, boundaries: Tensor | None, width: int
) -> Tensor:
    """State after x, from the last width - 1 inputs alone."""
    first = max(x.shape[1] - width + 1, 0)
    seen = x[:, first:]
    if seen.shape[1] < width - 1:
        seen = torch.cat([_inputs_before(x, initial_state, width), seen], 1)[:, -(width - 1) :]
    if boundaries is not None:  # zeros for what lies before the last start
        tail = boundaries[:, first:].cumsum(1)
        document = pad(tail, (width - 1 - tail.shape[1], 0))
        seen = seen.masked_fill((document != document[:, -1:])[..., None], 0)
    return seen.transpose(1, 2).contiguous()


# Shifted products summed in place: autograd would copy a full-size gradient for each tap.


@torch_op("conv_taps_torch")
def conv_taps(
    padded: Tensor, weight: Tensor, bias: Tensor | None, document: Tensor | None
) -> Tensor:
    """padded [b, width - 1 + s, c] -> [b, s, c] in float32 (float64 for float64).

    `document` [b, width - 1 + s] is the number of the document that each row belongs to.
    """
    b, c, width = padded.shape[0], *weight.shape
    s = padded.shape[1] - width + 1
    dtype = compute_dtype(padded.dtype)
    taps = weight.to(dtype).t().contiguous()
    y = padded.new_zeros(b, s, c, dtype=dtype)
    if bias is not None:
        y += bias.to(dtype)
    scratch = torch.empty_like(y)
    for j in range(width):
        y.addcmul_(_own(padded[:, j : j + s], document, j, scratch), taps[j])
    return y


@conv_taps.register_fake
def _(padded, weight, bias, document):
    b, rows, c = padded.shape
    s = rows - weight.shape[1] + 1
    return padded.new_empty(b, s, c, dtype=compute_dtype(padded.dtype))


@torch_op("conv_taps_torch_backward")
def conv_taps_backward(
    d_y: Tensor, padded: Tensor, weight: Tensor, document: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of padded, weight and bias, the latter two in the dtype of d_y."""
    width, s = weight.shape[1], d_y.shape[1]
    taps = weight.to(d_y.dtype).t().contiguous()
    d_padded, d_taps = torch.zeros_like(padded, dtype=d_y.dtype), torch.empty_like(taps)
    d_y = d_y.contiguous()
    scratch, product = torch.empty_like(d_y), torch.empty_like(d_y)
    for j in range(width):
        d_own = _own(d_y, document, j, scratch)
        d_padded[:, j : j + s].addcmul_(d_own, taps[j])
        torch.mul(d_own, padded[:, j : j + s], out=product)
        torch.sum(product, (0, 1), out=d_taps[j])
    return d_padded.to(padded.dtype), d_taps.t().contiguous(), d_y.sum((0, 1))


@conv_taps_backward.register_fake
def _(d_y, padded, weight, document):
    c = weight.shape[0]
    return torch.empty_like(padded), d_y.new_empty(weight.shape), d_y.new_empty(c)


def _save(ctx, inputs, output):
    padded, weight, bias, document = inputs
    ctx.save_for_backward(padded, weight, document)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx, d_y):
    padded, weight, document = ctx.saved_tensors
    d_padded, d_weight, d_bias = conv_taps_backward(d_y, padded, weight, document)
    d_bias = None if ctx.bias_dtype is None else d_bias.to(ctx.bias_dtype)
    return d_padded, d_weight.to(weight.dtype), d_bias, None


conv_taps.register_autograd(_differentiate, setup_context=_save)


def _own(x: Tensor, document: Tensor | None, j: int, scratch: Tensor) -> Tensor:
    """`x` [b, s, c] with zeros where tap j reaches into another document (written to `scratch`)."""
    s = x.shape[1]
    if document is None or j == document.shape[1] - s:
        return x
    same = document[:, j : j + s] == document[:, document.shape[1] - s :]
    return torch.mul(x, same[..., None].to(scratch.dtype), out=scratch)
