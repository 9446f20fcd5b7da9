"""Outputs of the cell and the gradient of v, which are one computation.

A row is a sum over the tokens of its chunk and the state at the edge of the chunk:
h_t  = [b_t q_t C + sum_{j <= t} D_tj (q_t.k_j) v_j] / normalizer_t and, with dC after the chunk,
dv_j = a_j k_j dC + sum_{t >= j} D_tj (k_j.q_t) d_h_t / normalizer_t.
"""

import triton
import triton.language as tl

from xlstm_kernels.common.triton_extremes import larger, smaller
from xlstm_kernels.mlstm.triton.gates import A_BAR, B_BAR, INVERSE, N_Q, SOURCE, STABILIZER, TARGET

CEILING = tl.constexpr(1.4426950408889634)  # the bound of exponents, 1, in units of log 2


@triton.jit
def load_rows(base, stride, count, o_t, o_d, DIM, BLOCK: tl.constexpr, EVEN_S: tl.constexpr):
    """Tile [o_t, o_d] of a tensor with `stride` between rows, of which `count` exist."""
    p_tile = base + o_t[:, None] * stride + o_d[None, :]
    if DIM % BLOCK != 0:
        if EVEN_S:
            b_tile = tl.load(p_tile, mask=(o_d < DIM)[None, :], other=0.0)
        else:
            m_tile = (o_t < count)[:, None] & (o_d < DIM)[None, :]
            b_tile = tl.load(p_tile, mask=m_tile, other=0.0)
    elif EVEN_S:
        b_tile = tl.load(p_tile)
    else:
        b_tile = tl.load(p_tile, mask=(o_t < count)[:, None], other=0.0)
    return b_tile


@triton.jit
def load_exponent(gates, i_plane, plane, o_t):
    """An exponent of the tokens o_t in units of log 2: its value and the remainder."""
    return tl.load(gates + i_plane * plane + o_t), tl.load(gates + (i_plane + 1) * plane + o_t)


@triton.jit
def pair_weights(row, row_rest, column, column_rest):
    """exp of the sums of all pairs of exponents (value + remainder, in units of log 2)."""
    exponent = (row[:, None] + column[None, :]) + (row_rest[:, None] + column_rest[None, :])
    return tl.exp2(smaller(exponent, CEILING))


@triton.jit
def outputs_kernel(
    a, b, x, out, states, n_states, gates, first,
    stride_ab, stride_ah, stride_as, stride_bb, stride_bh, stride_bs,
    stride_xb, stride_xh, stride_xs, stride_ob, stride_oh, stride_os,
    heads, s, chunks, x_tiles, plane, eps,
    QK: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BA: tl.constexpr,
    BX: tl.constexpr, BACKWARD: tl.constexpr, NORMALIZE: tl.constexpr, BOUNDED: tl.constexpr,
    EVEN_S: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A [BT, BX] tile of h or dv; grid rows * chunks * (L / BT) * x_tiles.

    Forward (a, b, x) = (q, k, v) and `states` are those before each chunk; backward (k, q, d_h) and
    the gradients of the states after each chunk. With NORMALIZE it writes the planes INVERSE and
    N_Q of `gates` forward, and reads INVERSE backward.
    """
    i_program = tl.program_id(0)
    tiles: tl.constexpr = L // BT
    i_x = i_program % x_tiles
    i_tile = (i_program // x_tiles) % tiles
    i_program = i_program // (x_tiles * tiles)
    i_chunk = i_program % chunks
    i_row = (i_program // chunks).to(tl.int64)
    i_batch, i_head = i_row // heads, i_row % heads
    start = i_chunk * L
    rows_left = s - start
    a += i_batch * stride_ab + i_head * stride_ah + start.to(tl.int64) * stride_as
    b += i_batch * stride_bb + i_head * stride_bh + start.to(tl.int64) * stride_bs
    x += i_batch * stride_xb + i_head * stride_xh + start.to(tl.int64) * stride_xs
    p_state = states + (i_row * chunks + i_chunk) * (QK * V)
    p_n = n_states + (i_row * chunks + i_chunk) * QK
    o_chunk = i_row * chunks * L + start  # of vectors over time
    gates += o_chunk
    ROW: tl.constexpr = SOURCE if BACKWARD else TARGET
    COLUMN: tl.constexpr = TARGET if BACKWARD else SOURCE
    GAIN: tl.constexpr = A_BAR if BACKWARD else B_BAR

    # [BT]
    o_in_tile = tl.arange(0, BT)
    o_t = i_tile * BT + o_in_tile
    b_row, b_row_rest = load_exponent(gates, ROW, plane, o_t)
    b_gain = tl.load(gates + GAIN * plane + o_t)
    b_first = tl.full([BT], -1, tl.int32)
    if BOUNDED:
        b_first = tl.load(first + o_chunk + o_t)
    # [BX]
    o_x = i_x * BX + tl.arange(0, BX)

    # The state at the edge of the chunk, and the pairs on the diagonal.
    b_out = tl.zeros([BT, BX], tl.float32)
    b_pairs = tl.zeros([BT, BT], tl.float32)
    b_nq = tl.zeros([BT], tl.float32)
    # [BT, BX]
    b_x = load_rows(x, stride_xs, rows_left, o_t, o_x, V, BX, EVEN_S)
    for i in tl.range(0, QK, BA, num_stages=STAGES):
        o_qk = i + tl.arange(0, BA)
        # [BT, BA]
        b_a = load_rows(a, stride_as, rows_left, o_t, o_qk, QK, BA, EVEN_S)
        b_b = load_rows(b, stride_bs, rows_left, o_t, o_qk, QK, BA, EVEN_S)
        # [BA, BX]
        b_state = load_rows(p_state + i * V, V, QK - i, tl.arange(0, BA), o_x, V, BX, QK % BA == 0)
        b_out = tl.dot(b_a, b_state.to(b_a.dtype), b_out, input_precision=PRECISION)
        b_pairs = tl.dot(b_a, tl.trans(b_b), b_pairs, input_precision=PRECISION)
        if NORMALIZE and not BACKWARD:
            # [BA]
            b_n = tl.load(p_n + o_qk, mask=o_qk < QK, other=0.0)
            b_nq += tl.sum(b_a.to(tl.float32) * b_n[None, :], 1)
    b_out *= b_gain[:, None]
    b_nq *= b_gain
    b_column, b_column_rest = load_exponent(gates, COLUMN, plane, o_t)
    # [BT, BT]
    b_weights = pair_weights(b_row, b_row_rest, b_column, b_column_rest)
    if BACKWARD:
        m_pairs = o_in_tile[:, None] <= o_in_tile[None, :]
        if BOUNDED:
            m_pairs = m_pairs & (o_t[:, None] >= b_first[None, :])
        if NORMALIZE:
            b_weights *= tl.load(gates + INVERSE * plane + o_t)[None, :]
    else:
        m_pairs = o_in_tile[:, None] >= o_in_tile[None, :]
        if BOUNDED:
            m_pairs = m_pairs & (b_first[:, None] <= o_t[None, :])
    b_pairs = tl.where(m_pairs, b_pairs * b_weights, 0.0)
    b_nq += tl.sum(b_pairs, 1)
    b_out = tl.dot(b_pairs.to(b_x.dtype), b_x, b_out, input_precision=PRECISION)

    # The other tiles of the chunk: before this one, or after it.
    begin = 0
    end = i_tile
    if BACKWARD:
        begin = i_tile + 1
        end = tiles
    for i_other in range(begin, end):
        # [BT]
        o_other = i_other * BT + o_in_tile
        # [BT, BX]
        b_other_x = load_rows(x, stride_xs, rows_left, o_other, o_x, V, BX, EVEN_S)
        b_scores = tl.zeros([BT, BT], tl.float32)
        for i in tl.range(0, QK, BA, num_stages=STAGES):
            o_qk = i + tl.arange(0, BA)
            # [BT, BA]
            b_a = load_rows(a, stride_as, rows_left, o_t, o_qk, QK, BA, EVEN_S)
            b_b = load_rows(b, stride_bs, rows_left, o_other, o_qk, QK, BA, EVEN_S)
            b_scores = tl.dot(b_a, tl.trans(b_b), b_scores, input_precision=PRECISION)
        b_other, b_other_rest = load_exponent(gates, COLUMN, plane, o_other)
        b_scores *= pair_weights(b_row, b_row_rest, b_other, b_other_rest)
        if BACKWARD:
            if NORMALIZE:
                b_scores *= tl.load(gates + INVERSE * plane + o_other)[None, :]
            if BOUNDED:
                b_other_first = tl.load(first + o_chunk + o_other)
                b_scores = tl.where(o_t[:, None] >= b_other_first[None, :], b_scores, 0.0)
        else:
            if BOUNDED:
                b_scores = tl.where(b_first[:, None] <= o_other[None, :], b_scores, 0.0)
            b_nq += tl.sum(b_scores, 1)
        b_out = tl.dot(b_scores.to(b_other_x.dtype), b_other_x, b_out, input_precision=PRECISION)

    if NORMALIZE and not BACKWARD:
        # [BT]
        b_m = tl.load(gates + STABILIZER * plane + o_t)
        # e^-80 instead of 0: no 0 / 0 where eps = 0 and q is orthogonal to n.
        b_inverse = 1.0 / (larger(tl.abs(b_nq), tl.exp(larger(-b_m, -80.0))) + eps)
        b_out *= b_inverse[:, None]
        if i_x == 0:
            tl.store(gates + INVERSE * plane + o_t, b_inverse)
            tl.store(gates + N_Q * plane + o_t, b_nq)
    # [BT, BX]
    out += i_batch * stride_ob + i_head * stride_oh + start.to(tl.int64) * stride_os
    p_out = out + o_t[:, None] * stride_os + o_x[None, :]
    m_out = (o_t < rows_left)[:, None] & (o_x < V)[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_out)
