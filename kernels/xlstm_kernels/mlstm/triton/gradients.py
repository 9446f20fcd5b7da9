"""Gradients of q and k, which are one computation, and what the gates' gradients need of them.

With dS_tj = w_tj (d_h_t.v_j / scale_t + d_overlap_t), the gradient of q_t.k_j:
dq_t = read_t (C d_h_t / scale_t + d_overlap_t n) + sum_{j <= t} dS_tj k_j, states before the chunk;
dk_j = write_j (dC v_j + dn) + sum_{t >= j} dS_tj q_t, gradients of the states after it.
Programs take the two roles in turn, so that those that share a chunk run side by side.
"""

import triton
import triton.language as tl

from xlstm_kernels.mlstm.triton.gates import (
    COLUMN_PAIRS,
    COLUMN_STATE,
    CORNER,
    INPUT,
    READ,
    ROW,
    SOURCE,
    TARGET,
    WRITE,
)
from xlstm_kernels.mlstm.triton.outputs import load_rows, pair_weights


@triton.jit
def score_gradients(raw, row_scale, row_bias, column_scale, column_bias, NORMALIZE: tl.constexpr):
    """d_h.v of all pairs, divided by the scale of the target, plus d_overlap of the target."""
    if NORMALIZE:
        raw = raw * (row_scale[:, None] * column_scale[None, :])
        raw = raw + (row_bias[:, None] + column_bias[None, :])
    return raw


@triton.jit
def query_key_gradients_kernel(
    q, k, v, d_h, dq, dk, states, d_states, n_states, d_n_states, gates, first, inverse, d_overlap,
    parts, across, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_db, stride_dh, stride_ds,
    heads, s, chunks, x_tiles, plane,
    QK: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BA: tl.constexpr,
    BX: tl.constexpr, NORMALIZE: tl.constexpr, BOUNDED: tl.constexpr, EVEN_S: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A [BT, BX] tile of dq (even programs) or dk (odd); grid 2 * rows * chunks * tiles * x_tiles.

    dq, dk [rows, s, QK] are contiguous. Also writes, in float32, `parts` (see triton_gates) and
    `across` [rows, chunks, x_tiles * L / BT]: shares of <C, dC> + <n, dn> over a chunk.
    """
    pid = tl.program_id(0)
    tiles: tl.constexpr = L // BT
    queries = pid % 2 == 0
    pid = pid // 2
    tile_x = pid % x_tiles
    tile = (pid // x_tiles) % tiles
    pid = pid // (x_tiles * tiles)
    chunk = pid % chunks
    row = (pid // chunks).to(tl.int64)
    batch, head = row // heads, row % heads
    start = chunk * L
    rows_left = s - start
    q += batch * stride_qb + head * stride_qh + start.to(tl.int64) * stride_qs
    k += batch * stride_kb + head * stride_kh + start.to(tl.int64) * stride_ks
    v += batch * stride_vb + head * stride_vh + start.to(tl.int64) * stride_vs
    d_h += batch * stride_db + head * stride_dh + start.to(tl.int64) * stride_ds
    edge = (row * chunks + chunk) * QK
    vector = row * chunks * L + start
    gates += vector
    total = x_tiles * plane
    parts += tile_x * plane + vector

    if queries:
        a = d_h
        b = v
        x = k
        y = q
        out = dq
        state = states + edge * V
        n_state = n_states + edge
    else:
        a = v
        b = d_h
        x = q
        y = k
        out = dk
        state = d_states + edge * V
        n_state = d_n_states + edge
    stride_a = tl.where(queries, stride_ds, stride_vs)
    stride_b = tl.where(queries, stride_vs, stride_ds)
    stride_x = tl.where(queries, stride_ks, stride_qs)
    stride_y = tl.where(queries, stride_qs, stride_ks)
    row_plane = tl.where(queries, TARGET, SOURCE)
    column_plane = tl.where(queries, SOURCE, TARGET)
    gain_plane = tl.where(queries, READ, WRITE)
    begin = tl.where(queries, 0, tile + 1)
    end = tl.where(queries, tile, tiles)

    place = tl.arange(0, BT)
    rt = tile * BT + place
    dx = tile_x * BX + tl.arange(0, BX)
    row_exp = tl.load(gates + row_plane * plane + rt)
    row_rest = tl.load(gates + (row_plane + 1) * plane + rt)
    gain = tl.load(gates + gain_plane * plane + rt)
    row_first = tl.full([BT], -1, tl.int32)
    if BOUNDED:
        row_first = tl.load(first + vector + rt)
    scale = tl.full([BT], 1.0, tl.float32)
    bias = tl.full([BT], 0.0, tl.float32)
    if NORMALIZE:
        scale = tl.load(inverse + vector + rt)
        bias = tl.load(d_overlap + vector + rt)
    row_scale, row_bias = tl.where(queries, scale, 1.0), tl.where(queries, bias, 0.0)

    # The state at the edge of the chunk.
    acc = tl.zeros([BT, BX], tl.float32)
    for i in tl.range(0, V, BA, num_stages=STAGES):
        da = i + tl.arange(0, BA)
        at = load_rows(a, stride_a, rows_left, rt, da, V, BA, EVEN_S)
        st = load_rows(state, V, QK, dx, da, V, BA, QK % BX == 0)
        acc = tl.dot(at, tl.trans(st.to(at.dtype)), acc, input_precision=PRECISION)
    if NORMALIZE:
        nt = tl.load(n_state + dx, mask=dx < QK, other=0.0)
        acc = acc * row_scale[:, None]
        acc += tl.where(queries, bias, 1.0)[:, None] * nt[None, :]
    elif not queries:
        acc += tl.load(n_state + dx, mask=dx < QK, other=0.0)[None, :]
    acc *= gain[:, None]
    yt = load_rows(y, stride_y, rows_left, rt, dx, QK, BX, EVEN_S)
    from_state = tl.sum(yt.to(tl.float32) * acc, 1)

    # Pairs with the other tiles of the chunk: sources before this one, or targets after it.
    for other in range(begin, end):
        ct = other * BT + place
        xo = load_rows(x, stride_x, rows_left, ct, dx, QK, BX, EVEN_S)
        scores = tl.zeros([BT, BT], tl.float32)
        for i in tl.range(0, V, BA, num_stages=STAGES):
            do = i + tl.arange(0, BA)
            ao = load_rows(a, stride_a, rows_left, rt, do, V, BA, EVEN_S)
            bo = load_rows(b, stride_b, rows_left, ct, do, V, BA, EVEN_S)
            scores = tl.dot(ao, tl.trans(bo), scores, input_precision=PRECISION)
        if NORMALIZE:
            other_scale = tl.where(queries, 1.0, tl.load(inverse + vector + ct))
            other_bias = tl.where(queries, 0.0, tl.load(d_overlap + vector + ct))
            scores = score_gradients(
                scores, row_scale, row_bias, other_scale, other_bias, NORMALIZE
            )
        scores *= pair_weights(
            row_exp, row_rest,
            tl.load(gates + column_plane * plane + ct),
            tl.load(gates + (column_plane + 1) * plane + ct),
        )  # fmt: skip
        if BOUNDED:
            fo = tl.load(first + vector + ct)
            visible = tl.where(
                queries, row_first[:, None] <= ct[None, :], fo[None, :] <= rt[:, None]
            )
            scores = tl.where(visible, scores, 0.0)
        acc = tl.dot(scores.to(xo.dtype), xo, acc, input_precision=PRECISION)
    from_pairs = tl.sum(yt.to(tl.float32) * acc, 1)

    # Pairs within this tile.
    xt = load_rows(x, stride_x, rows_left, rt, dx, QK, BX, EVEN_S)
    inner = tl.zeros([BT, BT], tl.float32)
    for i in tl.range(0, V, BA, num_stages=STAGES):
        dd = i + tl.arange(0, BA)
        ad = load_rows(a, stride_a, rows_left, rt, dd, V, BA, EVEN_S)
        bd = load_rows(b, stride_b, rows_left, rt, dd, V, BA, EVEN_S)
        inner = tl.dot(ad, tl.trans(bd), inner, input_precision=PRECISION)
    if NORMALIZE:
        inner = score_gradients(
            inner, row_scale, row_bias,
            tl.where(queries, 1.0, scale), tl.where(queries, 0.0, bias), NORMALIZE,
        )  # fmt: skip
    inner *= pair_weights(
        row_exp, row_rest,
        tl.load(gates + column_plane * plane + rt),
        tl.load(gates + (column_plane + 1) * plane + rt),
    )  # fmt: skip
    sign = tl.where(queries, 1, -1)
    causal = (place[:, None] - place[None, :]) * sign >= 0
    if BOUNDED:
        causal = causal & tl.where(
            queries, row_first[:, None] <= rt[None, :], row_first[None, :] <= rt[:, None]
        )
    inner = tl.where(causal, inner, 0.0)
    acc = tl.dot(inner.to(xt.dtype), xt, acc, input_precision=PRECISION)
    pointers = out + (row * s + start) * QK + rt[:, None] * QK + dx[None, :]
    inside = (rt < rows_left)[:, None] & (dx < QK)[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=inside)

    if queries:
        # Pairs that span a forget gate at t: targets at or after t, sources before it.
        overlap = tl.dot(yt, tl.trans(xt), input_precision=PRECISION) * inner
        spanning = tl.cumsum(overlap, 0, reverse=True)
        corner = tl.sum(tl.where(place[None, :] < place[:, None], spanning, 0.0), 1)
        tl.store(parts + ROW * total + rt, from_pairs)
        tl.store(parts + CORNER * total + rt, corner)
        # The forget gates of the whole chunk: tile i takes every i-th part of <C, dC>.
        passed = tl.zeros([BX], tl.float32)
        da = tl.arange(0, BA)
        for i in range(tile * BA, V, tiles * BA):
            before = load_rows(state, V, QK, dx, i + da, V, BA, QK % BX == 0)
            after = load_rows(d_states + edge * V, V, QK, dx, i + da, V, BA, QK % BX == 0)
            passed += tl.sum(before.to(tl.float32) * after.to(tl.float32), 1)
        if tile == 0:
            n = tl.load(n_states + edge + dx, mask=dx < QK, other=0.0)
            passed += n * tl.load(d_n_states + edge + dx, mask=dx < QK, other=0.0)
        share = ((row * chunks + chunk) * tiles + tile) * x_tiles + tile_x
        tl.store(across + share, tl.sum(passed, 0))
    else:
        tl.store(parts + COLUMN_STATE * total + rt, from_state)
        tl.store(parts + COLUMN_PAIRS * total + rt, from_pairs - from_state)
        tl.store(parts + INPUT * total + rt, tl.sum(yt.to(tl.float32) * acc, 1))
