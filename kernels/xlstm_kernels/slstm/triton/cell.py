"""One step of the sLSTM and its gradient on Triton, and loads and stores of the four gates.

Values are float32. Gates are in the order i, f, z, o.
"""

import triton
import triton.language as tl

from xlstm_kernels.common.triton_extremes import larger


@triton.jit
def gate_factors(i, f, m, SIGMOID: tl.constexpr):
    """write, decay, d decay / d f, and m after a step, without overflow; m may be -inf."""
    if SIGMOID:
        e = tl.exp(-tl.abs(f))
        # log(1 + e) keeps no digits of a small e, and its error adds up in m over the steps
        series = e * (1.0 - e * (0.5 - e * (1.0 / 3 - e * (0.25 - e * 0.2))))
        carried = tl.minimum(f, 0.0) - tl.where(e < 0.03, series, tl.log(1.0 + e)) + m
        closing = tl.where(f < 0.0, 1.0, e) / (1.0 + e)
    else:
        carried = f + m
        closing = tl.full(f.shape, 1.0, tl.float32)
    m = larger(carried, i)
    # Both exponentials: with one of the difference a broken gate would not show.
    write, decay = tl.exp(i - m), tl.exp(carried - m)
    return write, decay, decay * closing, m


@triton.jit
def tanh(x):
    """Tanh with full relative precision: a power series where exp would cancel."""
    x2 = x * x
    series = x * (1.0 - x2 * (1.0 / 3 - x2 * (2.0 / 15 - x2 * (17.0 / 315))))
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x2 < 0.01, series, tl.where(x < 0.0, -y, y))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def cell(i, f, z, o, c, n, m, SIGMOID: tl.constexpr):
    """One step from pre-activations: h, c, n, m, and what the backward pass keeps."""
    write, decay, closing, m = gate_factors(i, f, m, SIGMOID)
    z = tanh(z)
    o = sigmoid(o)
    c = decay * c + write * z
    n = decay * n + write
    return o * c / n, c, n, m, write, closing, z, o, decay


@triton.jit
def cell_gradient(d_h, d_c, d_n, write, closing, z, o, decay, c, n):
    """Gradients of the pre-activations i, f, z, o and of c, n before the step, which are given."""
    inverse = 1.0 / (decay * n + write)
    h = o * (decay * c + write * z) * inverse
    d_c += d_h * o * inverse
    d_n -= d_h * h * inverse
    d_i = write * (d_c * z + d_n)
    d_f = closing * (d_c * c + d_n * n)
    d_z = d_c * write * (1.0 - z * z)
    d_o = d_h * h * (1.0 - o)
    return d_i, d_f, d_z, d_o, d_c * decay, d_n * decay


@triton.jit
def load_wide(pointer, mask):
    """Masked load as float32, zeros elsewhere."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b, summed in float32."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_gates(p_gates, stride, m_tile):
    """The tiles of the four gates as float32, `stride` elements apart."""
    b_i, b_f = load_wide(p_gates, m_tile), load_wide(p_gates + stride, m_tile)
    b_z, b_o = load_wide(p_gates + 2 * stride, m_tile), load_wide(p_gates + 3 * stride, m_tile)
    return b_i, b_f, b_z, b_o


@triton.jit
def store_gates(p_gates, stride, b_i, b_f, b_z, b_o, m_tile):
    """Store a tile for each of the four gates, `stride` elements apart."""
    tl.store(p_gates, b_i.to(p_gates.dtype.element_ty), mask=m_tile)
    tl.store(p_gates + stride, b_f.to(p_gates.dtype.element_ty), mask=m_tile)
    tl.store(p_gates + 2 * stride, b_z.to(p_gates.dtype.element_ty), mask=m_tile)
    tl.store(p_gates + 3 * stride, b_o.to(p_gates.dtype.element_ty), mask=m_tile)


@triton.jit
def load_matrices(p_matrix, stride, m_matrix):
    """The tiles of the four recurrent matrices in their dtype, `stride` elements apart."""
    b_Ri = tl.load(p_matrix, mask=m_matrix, other=0.0)
    b_Rf = tl.load(p_matrix + stride, mask=m_matrix, other=0.0)
    b_Rz = tl.load(p_matrix + 2 * stride, mask=m_matrix, other=0.0)
    b_Ro = tl.load(p_matrix + 3 * stride, mask=m_matrix, other=0.0)
    return b_Ri, b_Rf, b_Rz, b_Ro
