"""The causal convolution and its gradient as compiled loops; used by `numba` only.

Arrays are flat. A task is one row of the batch and up to BLOCK channels, whose last inputs stay in
the cache. Tensors of tokens come with strides (batch, time), and channels lie side by side in them.
`weight` is [taps, channels], oldest tap first; `starts` [batch, steps] uint8. The number of
channels is a multiple of the vectors' length.
"""

from xlstm_kernels.common.numba.compiled import compiled
from xlstm_kernels.common.numba.vectors import LANES, inlined, load, sigmoid, splat, store

BLOCK = 128


@inlined
def reach_at(reach, t, start, taps):
    """How many tokens before token t it sees, from how many the token before it saw."""
    return 0 if start or t == 0 else min(reach + 1, taps - 1)


@inlined
def weighted(x, x0, step, weight, channels, taps, reach, bias, c):
    """The bias and the products of all taps that lie in the document, for channels from c."""
    y = load(bias, c)
    for k in range(reach + 1):
        y = y + load(weight, (taps - 1 - k) * channels + c) * load(x, x0 - k * step + c)
    return y


@compiled
def forward(
    first, end, steps, channels, taps, silu, strides, y_strides, x, weight, bias, starts, y
):
    """The tasks from `first` to before `end`; see `causal_conv1d`."""
    blocks = (channels + BLOCK - 1) // BLOCK
    for task in range(first, end):
        b, c0 = task // blocks, task % blocks * BLOCK
        reach = 0
        for t in range(steps):
            reach = reach_at(reach, t, starts[b * steps + t], taps)
            x0, y0 = b * strides[0] + t * strides[1], b * y_strides[0] + t * y_strides[1]
            for c in range(c0, min(c0 + BLOCK, channels), LANES):
                out = weighted(x, x0, strides[1], weight, channels, taps, reach, bias, c)
                if silu:
                    out = out * sigmoid(out)
                store(y, y0 + c, out)


@compiled
def backward(
    first, end, steps, channels, taps, silu, strides, dy_strides, dx_strides,
    d_y, x, weight, bias, starts, d_x, d_weight, d_bias,
):  # fmt: skip
    """Gradients of the tasks from `first` to before `end`.

    Each row of the batch has a sum of its own in d_weight [batch, taps, channels] and in d_bias
    [batch, channels].
    """
    blocks = (channels + BLOCK - 1) // BLOCK
    for task in range(first, end):
        b, c0 = task // blocks, task % blocks * BLOCK
        c1 = min(c0 + BLOCK, channels)
        for c in range(c0, c1, LANES):
            store(d_bias, b * channels + c, 0.0)
            for tap in range(taps):
                store(d_weight, (b * taps + tap) * channels + c, 0.0)
        reach = 0
        for t in range(steps):
            reach = reach_at(reach, t, starts[b * steps + t], taps)
            x0, y0 = b * strides[0] + t * strides[1], b * dy_strides[0] + t * dy_strides[1]
            d0 = b * dx_strides[0] + t * dx_strides[1]
            for c in range(c0, c1, LANES):
                d = load(d_y, y0 + c)
                if silu:
                    out = weighted(x, x0, strides[1], weight, channels, taps, reach, bias, c)
                    opening = sigmoid(out)
                    d = d * (opening + out * opening * (1.0 - opening))
                store(d_bias, b * channels + c, load(d_bias, b * channels + c) + d)
                store(d_x, d0 + c, splat(0.0))
                for k in range(reach + 1):
                    w0 = (b * taps + taps - 1 - k) * channels + c
                    store(d_weight, w0, load(d_weight, w0) + d * load(x, x0 - k * strides[1] + c))
                    at = d0 - k * dx_strides[1] + c
                    own = load(weight, (taps - 1 - k) * channels + c)
                    store(d_x, at, load(d_x, at) + d * own)
