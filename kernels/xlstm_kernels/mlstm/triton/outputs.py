"""Outputs of the cell and the gradient of v, which are one computation, and that of the normaliser.

A row is a sum over the tokens of its chunk and the state at the edge of the chunk:
h_t  = [read_t q_t C + sum_{j <= t} w_tj (q_t.k_j) v_j] / scale_t   and, with dC after the chunk,
dv_j = write_j k_j dC + sum_{t >= j} w_tj (k_j.q_t) d_h_t / scale_t.
"""

import triton
import triton.language as tl

from xlstm_kernels.mlstm.triton.gates import READ, SOURCE, STABILIZER, TARGET, WRITE

CEILING = tl.constexpr(1.4426950408889634)  # the bound of exponents, 1, in units of log 2


@triton.jit
def load_rows(base, stride, count, place, columns, DIM, BLOCK: tl.constexpr, EVEN_S: tl.constexpr):
    """Tile [place, columns] of a tensor with `stride` between rows, of which `count` exist."""
    pointers = base + place[:, None] * stride + columns[None, :]
    if DIM % BLOCK != 0:
        if EVEN_S:
            tile = tl.load(pointers, mask=(columns < DIM)[None, :], other=0.0)
        else:
            inside = (place < count)[:, None] & (columns < DIM)[None, :]
            tile = tl.load(pointers, mask=inside, other=0.0)
    elif EVEN_S:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(place < count)[:, None], other=0.0)
    return tile


@triton.jit
def pair_weights(row, row_rest, column, column_rest):
    """exp of the sums of all pairs of exponents (value + remainder, in units of log 2)."""
    exponent = (row[:, None] + column[None, :]) + (row_rest[:, None] + column_rest[None, :])
    return tl.exp2(tl.minimum(exponent, CEILING))


@triton.jit
def outputs_kernel(
    a, b, x, out, states, n_states, gates, first, inverse, overlap,
    stride_ab, stride_ah, stride_as, stride_bb, stride_bh, stride_bs,
    stride_xb, stride_xh, stride_xs, heads, s, chunks, x_tiles, plane, eps,
    QK: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BA: tl.constexpr,
    BX: tl.constexpr, BACKWARD: tl.constexpr, NORMALIZE: tl.constexpr, BOUNDED: tl.constexpr,
    EVEN_S: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A [BT, BX] tile of h or dv; grid rows * chunks * (L / BT) * x_tiles.

    Forward (a, b, x) = (q, k, v) and `states` are those before each chunk; backward (k, q, d_h) and
    the gradients of the states after each chunk. out [rows, s, V] is contiguous; forward with
    NORMALIZE writes inverse = 1 / scale and overlap = n.q, float32 [rows, T], backward reads
    inverse.
    """
    pid = tl.program_id(0)
    tiles: tl.constexpr = L // BT
    tile_x = pid % x_tiles
    tile = (pid // x_tiles) % tiles
    pid = pid // (x_tiles * tiles)
    chunk = pid % chunks
    row = (pid // chunks).to(tl.int64)
    batch, head = row // heads, row % heads
    start = chunk * L
    rows_left = s - start
    a += batch * stride_ab + head * stride_ah + start.to(tl.int64) * stride_as
    b += batch * stride_bb + head * stride_bh + start.to(tl.int64) * stride_bs
    x += batch * stride_xb + head * stride_xh + start.to(tl.int64) * stride_xs
    state = states + (row * chunks + chunk) * (QK * V)
    n_state = n_states + (row * chunks + chunk) * QK
    vector = row * chunks * L + start
    gates += vector
    ROW: tl.constexpr = SOURCE if BACKWARD else TARGET
    COLUMN: tl.constexpr = TARGET if BACKWARD else SOURCE
    GAIN: tl.constexpr = WRITE if BACKWARD else READ

    place = tl.arange(0, BT)
    rt = tile * BT + place
    dx = tile_x * BX + tl.arange(0, BX)
    row_exp = tl.load(gates + ROW * plane + rt)
    row_rest = tl.load(gates + (ROW + 1) * plane + rt)
    gain = tl.load(gates + GAIN * plane + rt)
    row_first = tl.full([BT], -1, tl.int32)
    if BOUNDED:
        row_first = tl.load(first + vector + rt)

    # The state at the edge of the chunk, and the pairs on the diagonal.
    acc = tl.zeros([BT, BX], tl.float32)
    pairs = tl.zeros([BT, BT], tl.float32)
    nq = tl.zeros([BT], tl.float32)
    xt = load_rows(x, stride_xs, rows_left, rt, dx, V, BX, EVEN_S)
    for i in tl.range(0, QK, BA, num_stages=STAGES):
        da = i + tl.arange(0, BA)
        at = load_rows(a, stride_as, rows_left, rt, da, QK, BA, EVEN_S)
        bt = load_rows(b, stride_bs, rows_left, rt, da, QK, BA, EVEN_S)
        st = load_rows(state + i * V, V, QK - i, tl.arange(0, BA), dx, V, BX, QK % BA == 0)
        acc = tl.dot(at, st.to(at.dtype), acc, input_precision=PRECISION)
        pairs = tl.dot(at, tl.trans(bt), pairs, input_precision=PRECISION)
        if NORMALIZE and not BACKWARD:
            nt = tl.load(n_state + da, mask=da < QK, other=0.0)
            nq += tl.sum(at.to(tl.float32) * nt[None, :], 1)
    acc *= gain[:, None]
    nq *= gain
    weights = pair_weights(
        row_exp, row_rest,
        tl.load(gates + COLUMN * plane + rt), tl.load(gates + (COLUMN + 1) * plane + rt),
    )  # fmt: skip
    if BACKWARD:
        keep = place[:, None] <= place[None, :]
        if BOUNDED:
            keep = keep & (rt[:, None] >= row_first[None, :])
        if NORMALIZE:
            weights *= tl.load(inverse + vector + rt)[None, :]
    else:
        keep = place[:, None] >= place[None, :]
        if BOUNDED:
            keep = keep & (row_first[:, None] <= rt[None, :])
    pairs = tl.where(keep, pairs * weights, 0.0)
    nq += tl.sum(pairs, 1)
    acc = tl.dot(pairs.to(xt.dtype), xt, acc, input_precision=PRECISION)

    # The other tiles of the chunk: before this one, or after it.
    begin = 0
    end = tile
    if BACKWARD:
        begin = tile + 1
        end = tiles
    for other in range(begin, end):
        ct = other * BT + place
        xo = load_rows(x, stride_xs, rows_left, ct, dx, V, BX, EVEN_S)
        scores = tl.zeros([BT, BT], tl.float32)
        for i in tl.range(0, QK, BA, num_stages=STAGES):
            do = i + tl.arange(0, BA)
            ao = load_rows(a, stride_as, rows_left, rt, do, QK, BA, EVEN_S)
            bo = load_rows(b, stride_bs, rows_left, ct, do, QK, BA, EVEN_S)
            scores = tl.dot(ao, tl.trans(bo), scores, input_precision=PRECISION)
        scores *= pair_weights(
            row_exp, row_rest,
            tl.load(gates + COLUMN * plane + ct), tl.load(gates + (COLUMN + 1) * plane + ct),
        )  # fmt: skip
        if BACKWARD:
            if NORMALIZE:
                scores *= tl.load(inverse + vector + ct)[None, :]
            if BOUNDED:
                fo = tl.load(first + vector + ct)
                scores = tl.where(rt[:, None] >= fo[None, :], scores, 0.0)
        else:
            if BOUNDED:
                scores = tl.where(row_first[:, None] <= ct[None, :], scores, 0.0)
            nq += tl.sum(scores, 1)
        acc = tl.dot(scores.to(xo.dtype), xo, acc, input_precision=PRECISION)

    if NORMALIZE and not BACKWARD:
        m = tl.load(gates + STABILIZER * plane + rt)
        # e^-80 instead of 0: no 0 / 0 where eps = 0 and q is orthogonal to n.
        scale = 1.0 / (tl.maximum(tl.abs(nq), tl.exp(tl.maximum(-m, -80.0))) + eps)
        acc *= scale[:, None]
        if tile_x == 0:
            tl.store(inverse + vector + rt, scale)
            tl.store(overlap + vector + rt, nq)
    pointers = out + (row * s + start) * V + rt[:, None] * V + dx[None, :]
    inside = (rt < rows_left)[:, None] & (dx < V)[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def normalizer_gradients_kernel(
    h, d_h, gates, inverse, overlap, d_overlap, stride_db, stride_dh, stride_ds,
    heads, s, padded, plane, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradient of n.q, float32 [rows, T]: -(d_h.h) / scale where |n.q| is the scale; grid T / BT.

    The grid is rows * T / BT. h [rows, s, V] is contiguous, d_h has strides.
    """
    pid = tl.program_id(0)
    blocks = padded // BT
    row = (pid // blocks).to(tl.int64)
    start = (pid % blocks) * BT
    batch, head = row // heads, row % heads
    d_h += batch * stride_db + head * stride_dh + start.to(tl.int64) * stride_ds
    h += (row * s + start) * V
    place = tl.arange(0, BT)
    product = tl.zeros([BT, BV], tl.float32)
    for i in range(0, V, BV):
        dv = i + tl.arange(0, BV)
        inside = (place < s - start)[:, None] & (dv < V)[None, :]
        ht = tl.load(h + place[:, None] * V + dv[None, :], mask=inside, other=0.0)
        dt = tl.load(d_h + place[:, None] * stride_ds + dv[None, :], mask=inside, other=0.0)
        product += ht.to(tl.float32) * dt.to(tl.float32)
    t = row * padded + start + place
    nq = tl.load(overlap + t)
    floor = tl.exp(tl.maximum(-tl.load(gates + STABILIZER * plane + t), -80.0))
    d_nq = tl.sum(product, 1) * tl.load(inverse + t)
    d_nq = tl.where(nq > 0, -d_nq, d_nq)
    tl.store(d_overlap + t, tl.where(tl.abs(nq) > floor, d_nq, 0.0))
