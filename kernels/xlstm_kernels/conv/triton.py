"""Causal depthwise convolution with SiLU on Triton: one pass over x forward, one over it backward.

The backward pass computes the pre-activation again instead of keeping it, for each tap: what it
reads for that is in the caches, and what it would write and read in float32 is not. Gradients of
weight and bias are summed per tile and then over tiles, in float32 and always in the same order.
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
    # Without .to every channel of a thread would take two registers.
    o_c = (i_program % across).to(tl.int32) * CHANNELS + tl.arange(0, CHANNELS)
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
def conv_backward(
    d_y, x, weight, bias, before, starts, d_more, d_x, d_before, d_taps, batch, steps, channels,
    stride_xb, stride_xs, stride_yb, stride_ys, stride_mb, stride_ms, stride_db, stride_ds,
    SILU: tl.constexpr, TAPS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """d_x of a tile, and the tile's part of the gradients of the taps and of the bias (the last).

    The state before x counts as TAPS - 1 tokens. d_more is added to d_x.
    """
    i_row, o_t, o_c = program_place(channels, CHANNELS, steps + (TAPS - 1), TOKENS)
    o_t -= TAPS - 1
    m_c = o_c < channels
    # [TOKENS, CHANNELS]
    b_x = own_inputs(x, before, i_row, o_t, o_c, m_c, steps, channels, stride_xb, stride_xs, TAPS)
    b_dx = tl.zeros([TOKENS, CHANNELS], tl.float32)
    i_part = tl.program_id(0).to(tl.int64) // tl.cdiv(channels, CHANNELS)
    p_part = d_taps + i_part * ((TAPS + 1) * channels) + o_c
    # [TOKENS]: whether the later token is still in the document of this one
    m_own = o_t < steps
    for on in tl.static_range(TAPS):
        o_later = o_t + on
        if starts is not None and on > 0:
            m_own = m_own & (starts_at(starts, i_row, o_later, steps) == 0)
        # [TOKENS, CHANNELS]: gradient of the pre-activation of the later token
        m_y = (m_own & (o_later >= 0) & (o_later < steps))[:, None] & m_c[None, :]
        o_y = (i_row * stride_yb + o_later * stride_ys)[:, None] + o_c[None, :]
        b_d = tl.load(d_y + o_y, mask=m_y, other=0.0).to(tl.float32)
        if SILU:
            b_pre = preactivation(
                x, weight, bias, before, starts, i_row, o_later, o_c, m_c, steps, channels,
                stride_xb, stride_xs, TAPS, TOKENS, CHANNELS,
            )  # fmt: skip
            b_gate = 1.0 / (1.0 + tl.exp(-b_pre))
            b_d = b_d * b_gate * (1.0 + b_pre * (1.0 - b_gate))
        # [CHANNELS]
        b_w = tl.load(weight + o_c * TAPS + (TAPS - 1 - on), mask=m_c, other=0.0).to(tl.float32)
        b_dx += b_d * b_w[None, :]
        tl.store(p_part + (TAPS - 1 - on) * channels, tl.sum(b_x * b_d, 0), mask=m_c)
        if on == 0:
            tl.store(p_part + TAPS * channels, tl.sum(b_d, 0), mask=m_c)
    # [TOKENS, CHANNELS]
    m_x = ((o_t >= 0) & (o_t < steps))[:, None] & m_c[None, :]
    if d_before is not None and TAPS > 1:
        o_before = (i_row * channels + o_c)[None, :] * (TAPS - 1) + (o_t + (TAPS - 1))[:, None]
        tl.store(d_before + o_before, b_dx, mask=(o_t < 0)[:, None] & m_c[None, :])
    if d_more is not None:
        o_more = (i_row * stride_mb + o_t * stride_ms)[:, None] + o_c[None, :]
        b_dx += tl.load(d_more + o_more, mask=m_x, other=0.0).to(tl.float32)
    o_x = (i_row * stride_db + o_t * stride_ds)[:, None] + o_c[None, :]
    tl.store(d_x + o_x, b_dx.to(d_x.dtype.element_ty), mask=m_x)


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


def _result(x: Tensor, times: int = 1) -> Tensor:
    """A fresh tensor like x with so many times its channels, in its order of tokens."""
    b, s, c = x.shape
    c *= times
    if x.stride(0) < x.stride(1):
        return x.new_empty(s, b, c).transpose(0, 1)
    return x.new_empty(b, s, c)


def plan_forward(x, weight, bias, before, starts, silu: bool, y) -> Launch:
    """The forward launch; starts is uint8 [b, s] or None."""
    arguments = {"x": x, "weight": weight, "bias": bias, "before": before, "starts": starts}
    arguments |= {"y": y, "SILU": silu, **_strides("x", x), **_strides("y", y)}
    return plan(conv_forward, arguments, x.shape, weight.shape[1], x.shape[1])


def plan_backward(d_y, x, weight, bias, before, starts, silu: bool, d_more, d_x, d_before):
    """The backward launch, and where it leaves parts [parts, taps + 1, c] of taps and bias."""
    b, s, c = x.shape
    taps = weight.shape[1]
    length = s + taps - 1
    d_taps = x.new_empty(b * triton.cdiv(length, TOKENS), taps + 1, c, dtype=torch.float32)
    arguments = {"d_y": d_y, "x": x, "weight": weight, "bias": bias, "before": before}
    arguments |= {"starts": starts, "d_more": d_more, "d_x": d_x, "d_before": d_before}
    arguments |= {"d_taps": d_taps, "SILU": silu, **_strides("x", x), **_strides("y", d_y)}
    arguments |= {**_strides("m", d_x if d_more is None else d_more), **_strides("d", d_x)}
    return plan(conv_backward, arguments, x.shape, taps, length), d_taps


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
    bias, before = (None if one is None else one.contiguous() for one in (bias, before))
    run_all([plan_forward(x, weight, bias, before, _bytes(boundaries), silu, y)], x)
    return y


@conv_triton.register_fake
def _(x, weight, bias, before, boundaries, silu):
    return _result(x)


@torch.library.custom_op("xlstm_kernels::causal_conv1d_triton_backward", mutates_args=())
def conv_gradients(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    boundaries: Tensor | None,
    silu: bool,
    d_more: Tensor | None,
    beside: Tensor | None,
) -> list[Tensor]:
    """Gradients of x, weight, bias and the initial state (the last three float32).

    Args:
        d_y: Gradient of y.
        x: As forward, and so are all up to `silu`.
        weight: [c, width].
        bias: [c] or None.
        before: [b, c, width - 1] or None.
        boundaries: [b, s] or None.
        silu: Whether y is activated.
        d_more: Gradient of x from elsewhere, [b, s, c]; it is added.
        beside: Gradient of what lies behind the channels of x in one tensor, [b, s, c]. The first
            result is then that of this tensor, [b, s, 2 * c].
    """
    d_all, d_x = _gradients(x, beside)
    x, weight, d_y = _readable(x), weight.contiguous(), _readable(d_y)
    bias, before = (None if one is None else one.contiguous() for one in (bias, before))
    d_more = None if d_more is None else _readable(d_more)
    b, _, c = x.shape
    taps = weight.shape[1]
    d_before = x.new_zeros(b, c, taps - 1, dtype=torch.float32)
    d_given = None if before is None else d_before
    launch, d_taps = plan_backward(
        d_y, x, weight, bias, before, _bytes(boundaries), silu, d_more, d_x, d_given
    )
    run_all([launch], x)
    if beside is not None:
        d_all[..., c:].copy_(beside)
    d_taps = d_taps.sum(0)
    return [d_all, d_taps[:taps].t().contiguous(), d_taps[taps].clone(), d_before]


def _gradients(x: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor]:
    """A fresh tensor for the gradient of x, with room for `beside`, and the part of x in it."""
    d_all = _result(x, 1 if beside is None else 2)
    return d_all, d_all[..., : x.shape[2]]


@conv_gradients.register_fake
def _(d_y, x, weight, bias, before, boundaries, silu, d_more, beside):
    b, _, c = x.shape
    taps, wide = weight.shape[1], {"dtype": torch.float32}
    return [
        _gradients(x, beside)[0],
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
    grads = conv_gradients(d_y, *tensors, ctx.silu, None, None)
    given = zip(grads, tensors[:4], strict=True)
    return *(None if x is None else grad.to(x.dtype) for grad, x in given), None, None


conv_triton.register_autograd(_differentiate, setup_context=_save)
