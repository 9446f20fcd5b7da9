"""Causal depthwise convolution with SiLU on Triton: one pass over x forward, two over it backward.

The backward pass computes the pre-activation again instead of keeping it. Gradients of weight and
bias are summed per tile and then over tiles, in float32 and always in the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_kernels.common.triton_launch import Launch, run_all, unsupported_reason

__all__ = ["conv_triton", "unsupported_reason"]

TOKENS, CHANNELS = 32, 64  # of a program
SIZES = ["batch", "steps"]  # vary without recompilation


@triton.jit
def own_inputs(
    x, before, i_row, o_t, o_c, m_c, steps, channels, stride_xb, stride_xs, TAPS: tl.constexpr
):
    """Inputs [tokens, channels] at times o_t of one row; o_t < 0 reads the state before x."""
    # [tokens, channels]
    o_x = (i_row * stride_xb + o_t * stride_xs)[:, None] + o_c[None, :]
    m_channels = m_c[None, :]
    b_x = tl.load(x + o_x, mask=m_channels & ((o_t >= 0) & (o_t < steps))[:, None], other=0.0)
    b_x = b_x.to(tl.float32)
    if before is not None and TAPS > 1:
        o_before = (i_row * channels + o_c)[None, :] * (TAPS - 1) + (o_t + (TAPS - 1))[:, None]
        m_early = ((o_t < 0) & (o_t >= 1 - TAPS))[:, None]
        b_x += tl.load(before + o_before, mask=m_channels & m_early, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def starts_at(starts, i_row, o_t, steps):
    """Whether a document starts at the times o_t; not outside the sequence."""
    return tl.load(starts + i_row * steps + o_t, mask=(o_t >= 0) & (o_t < steps), other=0) != 0


@triton.jit
def preactivation(
    x, weight, bias, before, starts, i_row, o_t, o_c, m_c, steps, channels, stride_xb, stride_xs,
    TAPS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sum of taps and bias at times o_t, [tokens, channels]; no tap leaves its document."""
    b_sum = tl.zeros([TOKENS, CHANNELS], tl.float32)
    if bias is not None:
        b_sum += tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    # [tokens]: whether the tap is still in the document of the token
    m_own = o_t < steps
    for back in tl.static_range(TAPS):
        # [channels]
        b_w = tl.load(weight + o_c * TAPS + (TAPS - 1 - back), mask=m_c, other=0.0).to(tl.float32)
        b_x = own_inputs(
            x, before, i_row, o_t - back, o_c, m_c, steps, channels, stride_xb, stride_xs, TAPS
        )
        b_sum += tl.where(m_own[:, None], b_x * b_w[None, :], 0.0)
        if starts is not None:
            m_own = m_own & (starts_at(starts, i_row, o_t - back, steps) == 0)
    return b_sum


@triton.jit
def program_place(channels, CHANNELS: tl.constexpr, length, TOKENS: tl.constexpr):
    """Row, times and channels of this program; programs go over channels, times, rows."""
    i_program = tl.program_id(0).to(tl.int64)
    across, along = tl.cdiv(channels, CHANNELS), tl.cdiv(length, TOKENS)
    o_c = i_program % across * CHANNELS + tl.arange(0, CHANNELS)
    o_t = i_program // across % along * TOKENS + tl.arange(0, TOKENS)
    return i_program // across // along, o_t, o_c


@triton.jit(do_not_specialize=SIZES)
def conv_forward(
    x, weight, bias, before, starts, y, batch, steps, channels,
    stride_xb, stride_xs, stride_yb, stride_ys,
    SILU: tl.constexpr, TAPS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y [batch, steps, channels] of a tile of tokens and channels."""
    i_row, o_t, o_c = program_place(channels, CHANNELS, steps, TOKENS)
    m_c = o_c < channels
    # [TOKENS, CHANNELS]
    b_y = preactivation(
        x, weight, bias, before, starts, i_row, o_t, o_c, m_c, steps, channels,
        stride_xb, stride_xs, TAPS, TOKENS, CHANNELS,
    )  # fmt: skip
    if SILU:
        b_y = b_y / (1.0 + tl.exp(-b_y))
    o_y = (i_row * stride_yb + o_t * stride_ys)[:, None] + o_c[None, :]
    tl.store(y + o_y, b_y.to(y.dtype.element_ty), mask=(o_t < steps)[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=SIZES)
def conv_backward_taps(
    d_y, x, weight, bias, before, starts, d_pre, d_taps, batch, steps, channels,
    stride_xb, stride_xs, stride_yb, stride_ys,
    SILU: tl.constexpr, TAPS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """d_pre of a tile, and its part of the gradients of the taps and of the bias (the last)."""
    i_row, o_t, o_c = program_place(channels, CHANNELS, steps, TOKENS)
    m_c = o_c < channels
    # [TOKENS, CHANNELS]
    o_y = (i_row * stride_yb + o_t * stride_ys)[:, None] + o_c[None, :]
    m_y = (o_t < steps)[:, None] & m_c[None, :]
    b_d = tl.load(d_y + o_y, mask=m_y, other=0.0).to(tl.float32)
    if SILU:
        b_pre = preactivation(
            x, weight, bias, before, starts, i_row, o_t, o_c, m_c, steps, channels,
            stride_xb, stride_xs, TAPS, TOKENS, CHANNELS,
        )  # fmt: skip
        b_gate = 1.0 / (1.0 + tl.exp(-b_pre))
        b_d = b_d * b_gate * (1.0 + b_pre * (1.0 - b_gate))
    o_pre = (i_row * steps + o_t)[:, None] * channels + o_c[None, :]
    tl.store(d_pre + o_pre, b_d, mask=m_y)
    i_part = tl.program_id(0).to(tl.int64) // tl.cdiv(channels, CHANNELS)
    p_part = d_taps + i_part * ((TAPS + 1) * channels)
    tl.store(p_part + TAPS * channels + o_c, tl.sum(b_d, 0), mask=m_c)
    # [TOKENS]
    m_own = o_t < steps
    for back in tl.static_range(TAPS):
        b_x = own_inputs(
            x, before, i_row, o_t - back, o_c, m_c, steps, channels, stride_xb, stride_xs, TAPS
        )
        b_tap = tl.sum(tl.where(m_own[:, None], b_x * b_d, 0.0), 0)
        tl.store(p_part + (TAPS - 1 - back) * channels + o_c, b_tap, mask=m_c)
        if starts is not None:
            m_own = m_own & (starts_at(starts, i_row, o_t - back, steps) == 0)


@triton.jit(do_not_specialize=SIZES)
def conv_backward_inputs(
    d_pre, weight, starts, d_x, d_before, batch, steps, channels, stride_xb, stride_xs,
    TAPS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """d_x of a tile of tokens and channels; the state before x counts as TAPS - 1 tokens."""
    i_row, o_t, o_c = program_place(channels, CHANNELS, steps + (TAPS - 1), TOKENS)
    o_t -= TAPS - 1
    m_c = o_c < channels
    b_dx = tl.zeros([TOKENS, CHANNELS], tl.float32)
    # [TOKENS]
    m_own = o_t < steps
    for on in tl.static_range(TAPS):
        o_later = o_t + on
        if starts is not None and on > 0:
            m_own = m_own & (starts_at(starts, i_row, o_later, steps) == 0)
        # [TOKENS, CHANNELS]
        o_pre = (i_row * steps + o_later)[:, None] * channels + o_c[None, :]
        m_pre = (m_own & (o_later >= 0) & (o_later < steps))[:, None] & m_c[None, :]
        # [CHANNELS]
        b_w = tl.load(weight + o_c * TAPS + (TAPS - 1 - on), mask=m_c, other=0.0).to(tl.float32)
        b_dx += tl.load(d_pre + o_pre, mask=m_pre, other=0.0) * b_w[None, :]
    # [TOKENS, CHANNELS]
    o_x = (i_row * stride_xb + o_t * stride_xs)[:, None] + o_c[None, :]
    m_x = ((o_t >= 0) & (o_t < steps))[:, None] & m_c[None, :]
    tl.store(d_x + o_x, b_dx.to(d_x.dtype.element_ty), mask=m_x)
    if d_before is not None and TAPS > 1:
        o_before = (i_row * channels + o_c)[None, :] * (TAPS - 1) + (o_t + (TAPS - 1))[:, None]
        tl.store(d_before + o_before, b_dx, mask=(o_t < 0)[:, None] & m_c[None, :])


def plan(kernel, arguments: dict, shape, taps: int, length: int) -> Launch:
    """The launch of `kernel` over `length` times of every row; `shape` is that of x."""
    batch, steps, channels = shape
    blocks = batch * triton.cdiv(length, TOKENS) * triton.cdiv(channels, CHANNELS)
    arguments = arguments | {"batch": batch, "steps": steps, "channels": channels, "TAPS": taps}
    arguments |= {"TOKENS": TOKENS, "CHANNELS": CHANNELS}
    return Launch(kernel.__name__, kernel, (blocks,), arguments, 8, 1)


def _strides(prefix: str, x: Tensor) -> dict[str, int]:
    """Strides over rows and times, by the names of the kernels' parameters."""
    return {f"stride_{prefix}b": x.stride(0), f"stride_{prefix}s": x.stride(1)}


def _readable(x: Tensor) -> Tensor:
    """`x`, copied only if the kernels cannot read it where it is."""
    return x if x.stride(2) == 1 and min(x.stride()) > 0 else x.contiguous()


def _result(x: Tensor) -> Tensor:
    """A fresh tensor like x, without gaps and in its order of tokens."""
    b, s, c = x.shape
    if x.stride(0) < x.stride(1):
        return x.new_empty(s, b, c).transpose(0, 1)
    return x.new_empty(b, s, c)


def plan_forward(x, weight, bias, before, starts, silu: bool, y) -> Launch:
    """The forward launch; starts is uint8 [b, s] or None."""
    arguments = {"x": x, "weight": weight, "bias": bias, "before": before, "starts": starts}
    arguments |= {"y": y, "SILU": silu, **_strides("x", x), **_strides("y", y)}
    return plan(conv_forward, arguments, x.shape, weight.shape[1], x.shape[1])


def plan_backward(d_y, x, weight, bias, before, starts, silu: bool, d_x, d_before):
    """The two backward launches, and where they leave the parts of the gradients of the taps."""
    b, s, c = x.shape
    taps = weight.shape[1]
    d_pre = x.new_empty(b, s, c, dtype=torch.float32)
    d_taps = x.new_empty(b * triton.cdiv(s, TOKENS), taps + 1, c, dtype=torch.float32)
    first = {"d_y": d_y, "x": x, "weight": weight, "bias": bias, "before": before}
    first |= {"starts": starts, "d_pre": d_pre, "d_taps": d_taps, "SILU": silu}
    first |= _strides("x", x) | _strides("y", d_y)
    second = {"d_pre": d_pre, "weight": weight, "starts": starts, "d_x": d_x, "d_before": d_before}
    second |= _strides("x", d_x)
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
    y = _result(x)
    x, weight = _readable(x), weight.contiguous()
    before = None if before is None else before.contiguous()
    run_all([plan_forward(x, weight, bias, before, _bytes(boundaries), silu, y)], x)
    return y


@conv_triton.register_fake
def _(x, weight, bias, before, boundaries, silu):
    return _result(x)


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
    d_x = _result(x)
    x, weight, d_y = _readable(x), weight.contiguous(), _readable(d_y)
    before = None if before is None else before.contiguous()
    b, _, c = x.shape
    taps = weight.shape[1]
    d_before = x.new_zeros(b, c, taps - 1, dtype=torch.float32)
    d_given = None if before is None else d_before
    launches, d_taps = plan_backward(
        d_y, x, weight, bias, before, _bytes(boundaries), silu, d_x, d_given
    )
    run_all(launches, x)
    d_taps = d_taps.sum(0)
    return [d_x, d_taps[:taps].t().contiguous(), d_taps[taps].clone(), d_before]


@_backward.register_fake
def _(d_y, x, weight, bias, before, boundaries, silu):
    b, _, c = x.shape
    taps, wide = weight.shape[1], {"dtype": torch.float32}
    return [
        _result(x),
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
