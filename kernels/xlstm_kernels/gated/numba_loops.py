"""SwiGLU and its gradient as compiled loops; used by `numba` only.

Arrays are flat and contiguous; `width` is a multiple of the vectors' length.
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
