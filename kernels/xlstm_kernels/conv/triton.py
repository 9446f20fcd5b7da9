"""Causal depthwise convolution with SiLU on Triton: one pass over x forward, two over it backward.

The backward pass computes the pre-activation again instead of keeping it. Gradients of weight and
bias are summed per tile and then over tiles, in float32 and always in the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_kernels.common.triton_launch import Launch, refusal, run_all

__all__ = ["conv_triton", "refusal"]

TOKENS, CHANNELS = 32, 64  # of a program
SIZES = ["batch", "steps"]  # vary without recompilation


@triton.jit
def own_inputs(x, before, row, t, c, inside, steps, channels, TAPS: tl.constexpr):
    """Inputs [tokens, channels] at times t of one row; t < 0 reads the state before x."""
    at = (row * steps + t)[:, None] * channels + c[None, :]
    inside = inside[None, :]
    value = tl.load(x + at, mask=inside & ((t >= 0) & (t < steps))[:, None], other=0.0)
    value = value.to(tl.float32)
    if before is not None and TAPS > 1:
        at = (row * channels + c)[None, :] * (TAPS - 1) + (t + (TAPS - 1))[:, None]
        early = ((t < 0) & (t >= 1 - TAPS))[:, None]
        value += tl.load(before + at, mask=inside & early, other=0.0).to(tl.float32)
    return value


@triton.jit
def starts_at(starts, row, t, steps):
    """Whether a document starts at the times t; not outside the sequence."""
    return tl.load(starts + row * steps + t, mask=(t >= 0) & (t < steps), other=0) != 0


@triton.jit
def preactivation(x, weight, bias, before, starts, row, t, c, inside, steps, channels,
                  TAPS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """Sum of taps and bias at times t, [tokens, channels]; no tap leaves its document."""
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    if bias is not None:
        total += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    alive = t < steps
    for back in tl.static_range(TAPS):
        w = tl.load(weight + c * TAPS + (TAPS - 1 - back), mask=inside, other=0.0).to(tl.float32)
        value = own_inputs(x, before, row, t - back, c, inside, steps, channels, TAPS)
        total += tl.where(alive[:, None], value * w[None, :], 0.0)
        if starts is not None:
            alive = alive & (starts_at(starts, row, t - back, steps) == 0)
    return total


@triton.jit
def program_place(channels, CHANNELS: tl.constexpr, length, TOKENS: tl.constexpr):
    """Row, first time and channels of this program; programs go over channels, times, rows."""
    pid = tl.program_id(0).to(tl.int64)
    across, along = tl.cdiv(channels, CHANNELS), tl.cdiv(length, TOKENS)
    c = pid % across * CHANNELS + tl.arange(0, CHANNELS)
    return pid // across // along, pid // across % along * TOKENS + tl.arange(0, TOKENS), c


@triton.jit(do_not_specialize=SIZES)
def conv_forward(
    x, weight, bias, before, starts, y, batch, steps, channels,
    SILU: tl.constexpr, TAPS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y [batch, steps, channels] of a tile of tokens and channels."""
    row, t, c = program_place(channels, CHANNELS, steps, TOKENS)
    inside = c < channels
    pre = preactivation(
        x, weight, bias, before, starts, row, t, c, inside, steps, channels, TAPS, TOKENS, CHANNELS
    )
    if SILU:
        pre = pre / (1.0 + tl.exp(-pre))
    at = (row * steps + t)[:, None] * channels + c[None, :]
    tl.store(y + at, pre.to(y.dtype.element_ty), mask=(t < steps)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=SIZES)
def conv_backward_taps(
    d_y, x, weight, bias, before, starts, d_pre, d_taps, batch, steps, channels,
    SILU: tl.constexpr, TAPS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """d_pre of a tile, and its part of the gradients of the taps and of the bias (the last)."""
    row, t, c = program_place(channels, CHANNELS, steps, TOKENS)
    inside = c < channels
    at = (row * steps + t)[:, None] * channels + c[None, :]
    mask = (t < steps)[:, None] & inside[None, :]
    d = tl.load(d_y + at, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        pre = preactivation(
            x, weight, bias, before, starts, row, t, c, inside, steps, channels,
            TAPS, TOKENS, CHANNELS,
        )  # fmt: skip
        gate = 1.0 / (1.0 + tl.exp(-pre))
        d = d * gate * (1.0 + pre * (1.0 - gate))
    tl.store(d_pre + at, d, mask=mask)
    part = d_taps + (tl.program_id(0).to(tl.int64) // tl.cdiv(channels, CHANNELS)) * (
        (TAPS + 1) * channels
    )
    tl.store(part + TAPS * channels + c, tl.sum(d, 0), mask=inside)
    alive = t < steps
    for back in tl.static_range(TAPS):
        value = own_inputs(x, before, row, t - back, c, inside, steps, channels, TAPS)
        summed = tl.sum(tl.where(alive[:, None], value * d, 0.0), 0)
        tl.store(part + (TAPS - 1 - back) * channels + c, summed, mask=inside)
        if starts is not None:
            alive = alive & (starts_at(starts, row, t - back, steps) == 0)


@triton.jit(do_not_specialize=SIZES)
def conv_backward_inputs(
    d_pre, weight, starts, d_x, d_before, batch, steps, channels,
    TAPS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """d_x of a tile of tokens and channels; the state before x counts as TAPS - 1 tokens."""
    row, t, c = program_place(channels, CHANNELS, steps + (TAPS - 1), TOKENS)
    t -= TAPS - 1
    inside = c < channels
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    alive = t < steps
    for on in tl.static_range(TAPS):
        later = t + on
        if starts is not None and on > 0:
            alive = alive & (starts_at(starts, row, later, steps) == 0)
        at = (row * steps + later)[:, None] * channels + c[None, :]
        known = (alive & (later >= 0) & (later < steps))[:, None] & inside[None, :]
        w = tl.load(weight + c * TAPS + (TAPS - 1 - on), mask=inside, other=0.0).to(tl.float32)
        total += tl.load(d_pre + at, mask=known, other=0.0) * w[None, :]
    at = (row * steps + t)[:, None] * channels + c[None, :]
    mask = ((t >= 0) & (t < steps))[:, None] & inside[None, :]
    tl.store(d_x + at, total.to(d_x.dtype.element_ty), mask=mask)
    if d_before is not None and TAPS > 1:
        at = (row * channels + c)[None, :] * (TAPS - 1) + (t + (TAPS - 1))[:, None]
        tl.store(d_before + at, total, mask=(t < 0)[:, None] & inside[None, :])


def plan(kernel, arguments: dict, shape, taps: int, length: int) -> Launch:
    """The launch of `kernel` over `length` times of every row; `shape` is that of x."""
    batch, steps, channels = shape
    blocks = batch * triton.cdiv(length, TOKENS) * triton.cdiv(channels, CHANNELS)
    arguments = arguments | {"batch": batch, "steps": steps, "channels": channels, "TAPS": taps}
    arguments |= {"TOKENS": TOKENS, "CHANNELS": CHANNELS}
    return Launch(kernel.__name__, kernel, (blocks,), arguments, 8, 1)


def plan_forward(x, weight, bias, before, starts, silu: bool, y) -> Launch:
    """The forward launch; starts is uint8 [b, s] or None."""
    arguments = {"x": x, "weight": weight, "bias": bias, "before": before, "starts": starts}
    arguments |= {"y": y, "SILU": silu}
    return plan(conv_forward, arguments, x.shape, weight.shape[1], x.shape[1])


def plan_backward(d_y, x, weight, bias, before, starts, silu: bool, d_x, d_before):
    """The two backward launches, and where they leave the parts of the gradients of the taps."""
    b, s, c = x.shape
    taps = weight.shape[1]
    d_pre = x.new_empty(b, s, c, dtype=torch.float32)
    d_taps = x.new_empty(b * triton.cdiv(s, TOKENS), taps + 1, c, dtype=torch.float32)
    first = {"d_y": d_y, "x": x, "weight": weight, "bias": bias, "before": before}
    first |= {"starts": starts, "d_pre": d_pre, "d_taps": d_taps, "SILU": silu}
    second = {"d_pre": d_pre, "weight": weight, "starts": starts, "d_x": d_x, "d_before": d_before}
    launches = [
        plan(conv_backward_taps, first, x.shape, taps, s),
        plan(conv_backward_inputs, second, x.shape, taps, s + taps - 1),
    ]
    return launches, d_taps


def _bytes(boundaries: Tensor | None) -> Tensor | None:
    return None if boundaries is None else boundaries.contiguous().view(torch.uint8)


@torch.library.custom_op("xlstm_kernels::causal_conv1d_triton", mutates_args=())
def conv_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    boundaries: Tensor | None,
    silu: bool,
) -> Tensor:
    """Triton backend of `xlstm_kernels.causal_conv1d` without the returned state.

    `before` is the initial state [b, c, width - 1]; checked arguments, same meaning.
    """
    x, weight = x.contiguous(), weight.contiguous()
    before = None if before is None else before.contiguous()
    y = torch.empty_like(x)
    run_all([plan_forward(x, weight, bias, before, _bytes(boundaries), silu, y)], x)
    return y


@conv_triton.register_fake
def _(x, weight, bias, before, boundaries, silu):
    return x.new_empty(x.shape)


@torch.library.custom_op("xlstm_kernels::causal_conv1d_triton_backward", mutates_args=())
def _backward(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    boundaries: Tensor | None,
    silu: bool,
) -> list[Tensor]:
    """Gradients of x, weight, bias and the initial state (the last three float32)."""
    x, weight, d_y = x.contiguous(), weight.contiguous(), d_y.contiguous()
    before = None if before is None else before.contiguous()
    b, _, c = x.shape
    taps = weight.shape[1]
    d_x, d_before = torch.empty_like(x), x.new_zeros(b, c, taps - 1, dtype=torch.float32)
    launches, d_taps = plan_backward(
        d_y, x, weight, bias, before, _bytes(boundaries), silu, d_x,
        None if before is None else d_before,
    )  # fmt: skip
    run_all(launches, x)
    d_taps = d_taps.sum(0)
    return [d_x, d_taps[:taps].t().contiguous(), d_taps[taps].clone(), d_before]


@_backward.register_fake
def _(d_y, x, weight, bias, before, boundaries, silu):
    b, _, c = x.shape
    taps, wide = weight.shape[1], {"dtype": torch.float32}
    return [
        x.new_empty(x.shape),
        x.new_empty(c, taps, **wide),
        x.new_empty(c, **wide),
        x.new_empty(b, c, taps - 1, **wide),
    ]


def _save(ctx, inputs, output):
    *tensors, silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.silu = silu


def _differentiate(ctx, d_y):
    tensors = ctx.saved_tensors
    grads = _backward(d_y, *tensors, ctx.silu)
    given = zip(grads, tensors[:4], strict=True)
    return *(None if x is None else grad.to(x.dtype) for grad, x in given), None, None


conv_triton.register_autograd(_differentiate, setup_context=_save)
