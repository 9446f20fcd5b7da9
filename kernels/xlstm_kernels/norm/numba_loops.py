"""The norm of each head and its gradient as compiled loops; used by `numba` only.

Arrays are flat. x, gate and d_y are [outer, inner, heads, d] with any strides but that of d, which
is 1; they come as (outer, inner, heads), and so do those of d_x. Other results are contiguous. d is
a multiple of the vectors' length. Statistics are computed again in the backward pass: a row is in
the cache then anyway.
"""

import math

from xlstm_kernels.common.numba.compiled import compiled
from xlstm_kernels.common.numba.vectors import LANES, inlined, lane_sum, load, sigmoid, splat, store


@inlined
def place(row, inner, head, strides):
    """Where a head's numbers begin in the row `outer * inner`."""
    return row // inner * strides[0] + row % inner * strides[1] + head * strides[2]


@inlined
def statistics(x, x0, d, eps, centered):
    """The mean of d numbers (0 if not centered), and 1 / their deviation from it."""
    mean = 0.0
    if centered:
        terms = splat(0.0)
        for j in range(0, d, LANES):
            terms = terms + load(x, x0 + j)
        mean = float(lane_sum(terms)) / d
    terms = splat(0.0)
    for j in range(0, d, LANES):
        apart = load(x, x0 + j) - mean
        terms = terms + apart * apart
    return mean, 1.0 / math.sqrt(float(lane_sum(terms)) / d + eps)


@compiled
def forward(
    first, end, inner, heads, d, eps, centered, gated, x_strides, gate_strides, x, weight, gate, y
):
    """Rows `outer * inner` from `first` to before `end`; see `multihead_norm`."""
    for row in range(first, end):
        for head in range(heads):
            x0, g0 = place(row, inner, head, x_strides), place(row, inner, head, gate_strides)
            y0 = (row * heads + head) * d
            mean, scale = statistics(x, x0, d, eps, centered)
            for j in range(0, d, LANES):
                out = (load(x, x0 + j) - mean) * scale * load(weight, head * d + j)
                if gated:
                    out = out * sigmoid(load(gate, g0 + j))
                store(y, y0 + j, out)


@compiled
def backward(
    first, end, parts, rows, inner, heads, d, eps, centered, gated,
    d_strides, x_strides, gate_strides, dx_strides, d_y, x, weight, gate, d_x, d_gate, d_weight,
):  # fmt: skip
    """Gradients of the rows in the parts from `first` to before `end`, of `parts` in all.

    Each part has a sum of its own in d_weight [parts, heads, d], so that the result does not depend
    on the number of threads.
    """
    for part in range(first, end):
        for j in range(0, heads * d, LANES):
            store(d_weight, part * heads * d + j, 0.0)
        for row in range(rows * part // parts, rows * (part + 1) // parts):
            for head in range(heads):
                x0, g0 = place(row, inner, head, x_strides), place(row, inner, head, gate_strides)
                d0, y0 = place(row, inner, head, d_strides), (row * heads + head) * d
                w0, dx0 = part * heads * d + head * d, place(row, inner, head, dx_strides)
                mean, scale = statistics(x, x0, d, eps, centered)
                along, plain = splat(0.0), splat(0.0)
                for j in range(0, d, LANES):
                    out, grad = (load(x, x0 + j) - mean) * scale, load(d_y, d0 + j)
                    factor = load(weight, head * d + j)
                    if gated:
                        opening = sigmoid(load(gate, g0 + j))
                        store(d_gate, y0 + j, grad * out * factor * opening * (1.0 - opening))
                        grad = grad * opening
                    store(d_weight, w0 + j, load(d_weight, w0 + j) + grad * out)
                    grad = grad * factor
                    along, plain = along + grad * out, plain + grad
                    store(d_x, dx0 + j, grad)
                common = float(lane_sum(plain)) / d if centered else 0.0
                share = float(lane_sum(along)) / d
                for j in range(0, d, LANES):
                    out = (load(x, x0 + j) - mean) * scale
                    store(d_x, dx0 + j, (load(d_x, dx0 + j) - common - out * share) * scale)
