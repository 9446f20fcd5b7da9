"""Gradients of q and k, which are one computation, and what the gates' gradients need of them.

With dS_tj = D_tj (d_h_t.v_j / normalizer_t + d_nq_t), the gradient of q_t.k_j:
dq_t = b_t (C d_h_t / normalizer_t + d_nq_t n) + sum_{j <= t} dS_tj k_j, states before the chunk;
dk_j = a_j (dC v_j + dn) + sum_{t >= j} dS_tj q_t, gradients of the states after it.
Every tile of columns of dq and of dk needs all of dS. Where there are many, in wide heads, it is
written once. Else each tile computes it, which costs less than to write and read it. Programs take
the two roles in turn, so that those that share a chunk run side by side.
"""

import triton
import triton.language as tl

from xlstm_kernels.common.triton_extremes import larger
from xlstm_kernels.mlstm.triton.gates import (
    A_BAR,
    B_BAR,
    COLUMN_PAIRS,
    COLUMN_STATE,
    CORNER,
    INPUT,
    INVERSE,
    N_Q,
    ROW,
    SOURCE,
    STABILIZER,
    TARGET,
)
from xlstm_kernels.mlstm.triton.outputs import load_exponent, load_rows, pair_weights


@triton.jit
def pair_products(
    a, b, stride_a, stride_b, rows_left, o_t, o_other, V: tl.constexpr, BT: tl.constexpr,
    BA: tl.constexpr, EVEN_S: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Products of rows o_t of a and rows o_other of b, [o_t, o_other]."""
    b_pairs = tl.zeros([BT, BT], tl.float32)
    for i in tl.range(0, V, BA, num_stages=STAGES):
        o_v = i + tl.arange(0, BA)
        # [BT, BA]
        b_a = load_rows(a, stride_a, rows_left, o_t, o_v, V, BA, EVEN_S)
        b_b = load_rows(b, stride_b, rows_left, o_other, o_v, V, BA, EVEN_S)
        b_pairs = tl.dot(b_a, tl.trans(b_b), b_pairs, input_precision=PRECISION)
    return b_pairs


@triton.jit
def pair_gradients(
    b_pairs, b_inverse, b_dnq, gates, first, plane, o_t, o_other, queries,
    CAUSAL: tl.constexpr, NORMALIZE: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """dS of products d_h.v, [o_t, o_other]: o_t are targets if `queries`, and sources if not.

    b_inverse and b_dnq are those of the targets. CAUSAL unless all sources lie before all targets:
    the mask costs registers.
    """
    if NORMALIZE:
        b_scale = tl.where(queries, b_inverse[:, None], b_inverse[None, :])
        b_pairs = b_pairs * b_scale + tl.where(queries, b_dnq[:, None], b_dnq[None, :])
    b_row, b_row_rest = load_exponent(gates, tl.where(queries, TARGET, SOURCE), plane, o_t)
    b_other, b_other_rest = load_exponent(gates, tl.where(queries, SOURCE, TARGET), plane, o_other)
    b_pairs *= pair_weights(b_row, b_row_rest, b_other, b_other_rest)
    if CAUSAL:
        sign = tl.where(queries, 1, -1)
        b_pairs = tl.where((o_t[:, None] - o_other[None, :]) * sign >= 0, b_pairs, 0.0)
    if BOUNDED:
        b_first = tl.load(first + tl.where(queries, o_t, o_other))  # of the targets
        m_pairs = tl.where(
            queries, b_first[:, None] <= o_other[None, :], b_first[None, :] <= o_t[:, None]
        )
        b_pairs = tl.where(m_pairs, b_pairs, 0.0)
    return b_pairs


@triton.jit
def target_gradients_kernel(
    h, v, d_h, gates, first, d_nq, d_pairs,
    stride_vb, stride_vh, stride_vs, stride_db, stride_dh, stride_ds, heads, s, chunks, plane,
    V: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BA: tl.constexpr,
    NORMALIZE: tl.constexpr, BOUNDED: tl.constexpr, EVEN_S: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What the gradient of h makes of BT targets alone; grid rows * chunks * (L / BT).

    With NORMALIZE d_nq, float32 [rows, T], the gradient of n.q: -(d_h.h) / normalizer where |n.q|
    is the normalizer. Where there is d_pairs [rows, T, L], dS: a row for each target and a column
    for each source of its chunk, up to the last column of the target's tile. h [rows, s, V] is
    contiguous, v and d_h have strides.
    """
    i_program = tl.program_id(0)
    tiles: tl.constexpr = L // BT
    i_tile = i_program % tiles
    i_program = i_program // tiles
    i_chunk = i_program % chunks
    i_row = (i_program // chunks).to(tl.int64)
    i_batch, i_head = i_row // heads, i_row % heads
    start = i_chunk * L
    rows_left = s - start
    d_h += i_batch * stride_db + i_head * stride_dh + start.to(tl.int64) * stride_ds
    o_chunk = i_row * chunks * L + start  # of vectors over time
    gates += o_chunk
    # [BT]
    o_in_tile = tl.arange(0, BT)
    o_t = i_tile * BT + o_in_tile
    if BOUNDED:
        first += o_chunk
    b_inverse = tl.full([BT], 1.0, tl.float32)
    b_dnq = tl.zeros([BT], tl.float32)
    if NORMALIZE:
        h += (i_row * s + start) * V
        b_product = tl.zeros([BT, BA], tl.float32)
        for i in range(0, V, BA):
            o_v = i + tl.arange(0, BA)
            # [BT, BA]
            b_h = load_rows(h, V, rows_left, o_t, o_v, V, BA, EVEN_S)
            b_dh = load_rows(d_h, stride_ds, rows_left, o_t, o_v, V, BA, EVEN_S)
            b_product += b_h.to(tl.float32) * b_dh.to(tl.float32)
        # [BT]
        b_nq = tl.load(gates + N_Q * plane + o_t)
        b_least = tl.exp(larger(-tl.load(gates + STABILIZER * plane + o_t), -80.0))
        b_inverse = tl.load(gates + INVERSE * plane + o_t)
        b_dnq = tl.sum(b_product, 1) * b_inverse
        b_dnq = tl.where(b_nq > 0, -b_dnq, b_dnq)
        b_dnq = tl.where(tl.abs(b_nq) <= b_least, 0.0, b_dnq)
        tl.store(d_nq + o_chunk + o_t, b_dnq)

    if d_pairs is not None:
        v += i_batch * stride_vb + i_head * stride_vh + start.to(tl.int64) * stride_vs
        for i_other in range(0, i_tile + 1):
            # [BT]
            o_other = i_other * BT + o_in_tile
            # [BT, BT]
            b_pairs = pair_products(
                d_h, v, stride_ds, stride_vs, rows_left, o_t, o_other,
                V, BT, BA, EVEN_S, PRECISION, STAGES,
            )  # fmt: skip
            b_pairs = pair_gradients(
                b_pairs, b_inverse, b_dnq, gates, first, plane, o_t, o_other, True,
                True, NORMALIZE, BOUNDED,
            )  # fmt: skip
            p_pairs = d_pairs + (o_chunk + o_t)[:, None] * L + o_other[None, :]
            tl.store(p_pairs, b_pairs.to(d_pairs.dtype.element_ty))


@triton.jit
def load_pairs(d_pairs, o_t, o_other, L: tl.constexpr, queries):
    """What `pair_gradients` made of a chunk, [o_t, o_other]."""
    stride_t = tl.where(queries, L, 1)
    stride_other = tl.where(queries, 1, L)
    return tl.load(d_pairs + o_t[:, None] * stride_t + o_other[None, :] * stride_other)


@triton.jit
def query_key_gradients_kernel(
    q, k, v, d_h, dq, dk, states, d_states, n_states, d_n_states, gates, first, d_nq,
    d_pairs, parts, across, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_db, stride_dh, stride_ds,
    stride_ob, stride_oh, stride_os, heads, s, chunks, x_tiles, plane,
    QK: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BA: tl.constexpr,
    BX: tl.constexpr, NORMALIZE: tl.constexpr, BOUNDED: tl.constexpr, EVEN_S: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A [BT, BX] tile of dq (even programs) or dk (odd); grid 2 * rows * chunks * tiles * x_tiles.

    dq and dk have the same strides. Also writes, in float32, `parts` (see `gates`) and
    `across` [rows, chunks, x_tiles * L / BT]: shares of <C, dC> + <n, dn> over a chunk. Without
    d_pairs the program computes the rows or columns of dS that it needs.
    """
    i_program = tl.program_id(0)
    tiles: tl.constexpr = L // BT
    queries = i_program % 2 == 0
    i_program = i_program // 2
    i_x = i_program % x_tiles
    i_tile = (i_program // x_tiles) % tiles
    i_program = i_program // (x_tiles * tiles)
    i_chunk = i_program % chunks
    i_row = (i_program // chunks).to(tl.int64)
    i_batch, i_head = i_row // heads, i_row % heads
    start = i_chunk * L
    rows_left = s - start
    q += i_batch * stride_qb + i_head * stride_qh + start.to(tl.int64) * stride_qs
    k += i_batch * stride_kb + i_head * stride_kh + start.to(tl.int64) * stride_ks
    v += i_batch * stride_vb + i_head * stride_vh + start.to(tl.int64) * stride_vs
    d_h += i_batch * stride_db + i_head * stride_dh + start.to(tl.int64) * stride_ds
    o_edge = (i_row * chunks + i_chunk) * QK  # of states
    o_chunk = i_row * chunks * L + start  # of vectors over time
    gates += o_chunk
    if BOUNDED:
        first += o_chunk
    if NORMALIZE:
        d_nq += o_chunk
    if d_pairs is not None:
        d_pairs += o_chunk * L
    total = x_tiles * plane
    parts += i_x * plane + o_chunk

    # The result is out = f(a, b, x), and y is what it is the gradient of.
    if queries:
        a = d_h
        b = v
        x = k
        y = q
        out = dq
        p_state = states + o_edge * V
        p_n = n_states + o_edge
    else:
        a = v
        b = d_h
        x = q
        y = k
        out = dk
        p_state = d_states + o_edge * V
        p_n = d_n_states + o_edge
    stride_a = tl.where(queries, stride_ds, stride_vs)
    stride_b = tl.where(queries, stride_vs, stride_ds)
    stride_x = tl.where(queries, stride_ks, stride_qs)
    stride_y = tl.where(queries, stride_qs, stride_ks)
    gain_plane = tl.where(queries, B_BAR, A_BAR)
    begin = tl.where(queries, 0, i_tile + 1)
    end = tl.where(queries, i_tile, tiles)

    # [BT]
    o_in_tile = tl.arange(0, BT)
    o_t = i_tile * BT + o_in_tile
    # [BX]
    o_x = i_x * BX + tl.arange(0, BX)
    # [BT]
    b_gain = tl.load(gates + gain_plane * plane + o_t)
    b_inverse = tl.full([BT], 1.0, tl.float32)
    b_dnq = tl.zeros([BT], tl.float32)
    if NORMALIZE:
        b_inverse = tl.load(gates + INVERSE * plane + o_t)
        b_dnq = tl.load(d_nq + o_t)

    # The state at the edge of the chunk.
    b_out = tl.zeros([BT, BX], tl.float32)
    for i in tl.range(0, V, BA, num_stages=STAGES):
        o_v = i + tl.arange(0, BA)
        # [BT, BA], [BX, BA]
        b_a = load_rows(a, stride_a, rows_left, o_t, o_v, V, BA, EVEN_S)
        b_state = load_rows(p_state, V, QK, o_x, o_v, V, BA, QK % BX == 0)
        b_out = tl.dot(b_a, tl.trans(b_state.to(b_a.dtype)), b_out, input_precision=PRECISION)
    # [BX]
    if NORMALIZE:
        b_n = tl.load(p_n + o_x, mask=o_x < QK, other=0.0)
        b_out = b_out * tl.where(queries, b_inverse, 1.0)[:, None]
        b_out += tl.where(queries, b_dnq, 1.0)[:, None] * b_n[None, :]
    elif not queries:
        b_out += tl.load(p_n + o_x, mask=o_x < QK, other=0.0)[None, :]
    b_out *= b_gain[:, None]
    # [BT, BX]
    b_y = load_rows(y, stride_y, rows_left, o_t, o_x, QK, BX, EVEN_S)
    b_from_state = tl.sum(b_y.to(tl.float32) * b_out, 1)

    # Pairs with the other tiles of the chunk: sources before this one, or targets after it.
    for i_other in range(begin, end):
        # [BT]
        o_other = i_other * BT + o_in_tile
        # [BT, BX]
        b_other_x = load_rows(x, stride_x, rows_left, o_other, o_x, QK, BX, EVEN_S)
        # [BT, BT]
        if d_pairs is not None:
            b_scores = load_pairs(d_pairs, o_t, o_other, L, queries)
        else:
            b_scores = pair_products(
                a, b, stride_a, stride_b, rows_left, o_t, o_other,
                V, BT, BA, EVEN_S, PRECISION, STAGES,
            )  # fmt: skip
            if NORMALIZE:
                o_target = tl.where(queries, o_t, o_other)
                b_inverse = tl.load(gates + INVERSE * plane + o_target)
                b_dnq = tl.load(d_nq + o_target)
            b_scores = pair_gradients(
                b_scores, b_inverse, b_dnq, gates, first, plane, o_t, o_other, queries,
                False, NORMALIZE, BOUNDED,
            )  # fmt: skip
        b_out = tl.dot(b_scores.to(b_other_x.dtype), b_other_x, b_out, input_precision=PRECISION)
    b_from_pairs = tl.sum(b_y.to(tl.float32) * b_out, 1)

    # Pairs within this tile.
    # [BT, BX]
    b_x = load_rows(x, stride_x, rows_left, o_t, o_x, QK, BX, EVEN_S)
    # [BT, BT]
    if d_pairs is not None:
        b_inner = load_pairs(d_pairs, o_t, o_t, L, queries)
    else:
        b_inner = pair_products(
            a, b, stride_a, stride_b, rows_left, o_t, o_t, V, BT, BA, EVEN_S, PRECISION, STAGES
        )
        if NORMALIZE:
            b_inverse = tl.load(gates + INVERSE * plane + o_t)
            b_dnq = tl.load(d_nq + o_t)
        b_inner = pair_gradients(
            b_inner, b_inverse, b_dnq, gates, first, plane, o_t, o_t, queries,
            True, NORMALIZE, BOUNDED,
        )  # fmt: skip
    b_out = tl.dot(b_inner.to(b_x.dtype), b_x, b_out, input_precision=PRECISION)
    # [BT, BX]
    out += i_batch * stride_ob + i_head * stride_oh + start.to(tl.int64) * stride_os
    p_out = out + o_t[:, None] * stride_os + o_x[None, :]
    m_out = (o_t < rows_left)[:, None] & (o_x < QK)[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_out)

    if queries:
        # Pairs that span a forget gate at t: targets at or after t, sources before it.
        b_shares = tl.dot(b_y, tl.trans(b_x), input_precision=PRECISION) * b_inner.to(tl.float32)
        b_spanning = tl.cumsum(b_shares, 0, reverse=True)
        b_corner = tl.sum(tl.where(o_in_tile[None, :] < o_in_tile[:, None], b_spanning, 0.0), 1)
        tl.store(parts + ROW * total + o_t, b_from_pairs)
        tl.store(parts + CORNER * total + o_t, b_corner)
        # The forget gates of the whole chunk: tile i takes every i-th part of <C, dC>.
        # [BX]
        b_passed = tl.zeros([BX], tl.float32)
        o_a = tl.arange(0, BA)
        for i in range(i_tile * BA, V, tiles * BA):
            # [BX, BA]
            b_before = load_rows(p_state, V, QK, o_x, i + o_a, V, BA, QK % BX == 0)
            b_after = load_rows(d_states + o_edge * V, V, QK, o_x, i + o_a, V, BA, QK % BX == 0)
            b_passed += tl.sum(b_before.to(tl.float32) * b_after.to(tl.float32), 1)
        if i_tile == 0:
            # [BX]
            b_n_before = tl.load(n_states + o_edge + o_x, mask=o_x < QK, other=0.0)
            b_passed += b_n_before * tl.load(d_n_states + o_edge + o_x, mask=o_x < QK, other=0.0)
        o_share = ((i_row * chunks + i_chunk) * tiles + i_tile) * x_tiles + i_x
        tl.store(across + o_share, tl.sum(b_passed, 0))
    else:
        tl.store(parts + COLUMN_STATE * total + o_t, b_from_state)
        tl.store(parts + COLUMN_PAIRS * total + o_t, b_from_pairs - b_from_state)
        tl.store(parts + INPUT * total + o_t, tl.sum(b_y.to(tl.float32) * b_out, 1))
