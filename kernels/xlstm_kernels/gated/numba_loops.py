"""SwiGLU, the skip of classic blocks, and their gradients as compiled loops; used by `numba` only.

Arrays are flat, and contiguous where no strides are given; `width` is a multiple of the vectors'
length.
"""

from xlstm_kernels.common.numba.compiled import compiled
from xlstm_kernels.common.numba.vectors import LANES, load, sigmoid, store


@compiled
def forward(first, end, width, gate_up, out):
    """Rows from `first` to before `end`: gate_up [rows, 2 * width] to out [rows, width]."""
    for row in range(first, end):
        x0, y0 = row * 2 * width, row * width
        for j in range(0, width, LANES):
            gate = load(gate_up, x0 + j)
            store(out, y0 + j, gate * sigmoid(gate) * load(gate_up, x0 + width + j))


@compiled
def backward(first, end, width, d_out, gate_up, d_gate_up):
    """Rows from `first` to before `end` of the gradient of `gate_up`."""
    for row in range(first, end):
        x0, y0 = row * 2 * width, row * width
        for j in range(0, width, LANES):
            gate, d = load(gate_up, x0 + j), load(d_out, y0 + j)
            opening = sigmoid(gate)
            active = gate * opening
            slope = opening + active * (1.0 - opening)
            store(d_gate_up, x0 + j, d * load(gate_up, x0 + width + j) * slope)
            store(d_gate_up, x0 + width + j, d * active)


@compiled
def forward_skip(first, end, batch, width, h_strides, x_strides, gate_strides, h, x, gate, skip, y):
    """Rows from `first` to before `end`; see `gated_skip`. Strides are (row, batch)."""
    for row in range(first, end):
        for b in range(batch):
            h0, x0 = row * h_strides[0] + b * h_strides[1], row * x_strides[0] + b * x_strides[1]
            g0, y0 = row * gate_strides[0] + b * gate_strides[1], (row * batch + b) * width
            for j in range(0, width, LANES):
                opening = load(gate, g0 + j)
                out = load(h, h0 + j) + load(skip, j) * load(x, x0 + j)
                store(y, y0 + j, out * (opening * sigmoid(opening)))


@compiled
def backward_skip(
    first, end, parts, rows, batch, width, d_strides, h_strides, x_strides, gate_strides,
    d_y, h, x, gate, skip, d_h, d_x, d_gate, d_skip,
):  # fmt: skip
    """Gradients of the rows in the parts from `first` to before `end`, of `parts` in all.

    Each part has a sum of its own in d_skip [parts, width], so that the result does not depend on
    the number of threads.
    """
    for part in range(first, end):
        d_skip[part * width : (part + 1) * width] = 0.0
        for token in range(rows * part // parts * batch, rows * (part + 1) // parts * batch):
            row, b = token // batch, token % batch
            d0, h0 = row * d_strides[0] + b * d_strides[1], row * h_strides[0] + b * h_strides[1]
            x0 = row * x_strides[0] + b * x_strides[1]
            g0, y0 = row * gate_strides[0] + b * gate_strides[1], token * width
            for j in range(0, width, LANES):
                before, source, factor = load(gate, g0 + j), load(x, x0 + j), load(skip, j)
                opening = sigmoid(before)
                active = before * opening
                d = load(d_y, d0 + j)
                inside = d * active
                store(d_h, y0 + j, inside)
                store(d_x, y0 + j, inside * factor)
                at = part * width + j
                store(d_skip, at, load(d_skip, at) + inside * source)
                slope = opening + active * (1.0 - opening)
                store(d_gate, y0 + j, d * (load(h, h0 + j) + factor * source) * slope)
