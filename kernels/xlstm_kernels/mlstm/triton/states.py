"""The states (C, n) between chunks, and their gradients: one kernel, run forward or backward.

Forward, the state before a chunk is stored and the chunk is written into it:
S <- keep S + (write k)^T v. The gradient of the state after a chunk obeys the same recurrence from
the last chunk to the first: S <- keep S + (read q / scale)^T d_h. Rows of n ride along as products
with one column.
"""

import triton
import triton.language as tl

from xlstm_kernels.mlstm.triton.gates import READ, WRITE

WHOLE, PIECE, RESUME = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def states_kernel(
    a, b, gates, keep, inverse, d_overlap, first_c, first_n, states, n_states, last_c, last_n,
    pieces_c, pieces_n, pieces_keep,
    stride_ab, stride_ah, stride_as, stride_bb, stride_bh, stride_bs,
    heads, s, chunks, segments, chunks_per_segment, q_tiles, v_tiles, plane,
    QK: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BQ: tl.constexpr, BV: tl.constexpr,
    BL: tl.constexpr, BACKWARD: tl.constexpr, NORMALIZE: tl.constexpr, PHASE: tl.constexpr,
    STORE_LAST: tl.constexpr, EVEN_S: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One [BQ, BV] tile of the state of one row; grid rows * segments * q_tiles * v_tiles.

    `a` [rows, s, QK] is k, or q backward; `b` [rows, s, V] is v, or d_h. The carried tile is stored
    before each chunk: states [rows, chunks, QK, V], n_states [rows, chunks, QK]. It starts from
    first_c, first_n (None: zeros) and ends in last_c, last_n. The sequence is cut into segments
    where the tiles alone do not fill a GPU: PIECE finds what each segment writes and its decay,
    RESUME adds up the pieces before its own segment (after it, backward) and goes on as WHOLE does.
    """
    pid = tl.program_id(0)
    tile_v = pid % v_tiles
    tile_q = (pid // v_tiles) % q_tiles
    pid = pid // (v_tiles * q_tiles)
    segment = pid % segments  # in the order of processing
    row = (pid // segments).to(tl.int64)
    batch, head = row // heads, row % heads
    dq = tile_q * BQ + tl.arange(0, BQ)
    dv = tile_v * BV + tl.arange(0, BV)
    in_q, in_v = dq < QK, dv < V
    in_tile = in_q[:, None] & in_v[None, :]
    tile = dq[:, None] * V + dv[None, :]
    a += batch * stride_ab + head * stride_ah
    b += batch * stride_bb + head * stride_bh
    gates += row * chunks * L
    keep += row * chunks

    if PHASE != PIECE and first_c is not None:
        S = tl.load(first_c + row * (QK * V) + tile, mask=in_tile, other=0.0).to(tl.float32)
    else:
        S = tl.zeros([BQ, BV], tl.float32)
    if PHASE != PIECE and first_n is not None:
        n = tl.load(first_n + row * QK + dq, mask=in_q, other=0.0).to(tl.float32)
        n = tl.broadcast_to(n[:, None], [BQ, 16])
    else:
        n = tl.zeros([BQ, 16], tl.float32)
    if PHASE == RESUME:
        for earlier in range(segment):
            piece = row * (segments - 1) + earlier
            decay = tl.load(pieces_keep + piece)
            S = S * decay + tl.load(pieces_c + piece * (QK * V) + tile, mask=in_tile, other=0.0)
            more = tl.load(pieces_n + piece * QK + dq, mask=in_q, other=0.0)
            n = n * decay + more[:, None]

    per_chunk: tl.constexpr = L // BL
    begin = segment * chunks_per_segment
    end = tl.minimum(begin + chunks_per_segment, chunks)
    whole = 1.0  # decay over the segment
    for step in tl.range(begin * per_chunk, end * per_chunk, num_stages=STAGES):
        chunk = step // per_chunk
        if BACKWARD:
            chunk = chunks - 1 - chunk
        block = step % per_chunk
        start = chunk * L + block * BL
        place = tl.arange(0, BL)
        rows_left = s - start
        ap = a + start.to(tl.int64) * stride_as + place[None, :] * stride_as + dq[:, None]
        bp = b + start.to(tl.int64) * stride_bs + place[:, None] * stride_bs + dv[None, :]
        mask_a, mask_b = in_q[:, None], in_v[None, :]
        if not EVEN_S:
            mask_a = mask_a & (place < rows_left)[None, :]
            mask_b = mask_b & (place < rows_left)[:, None]
        at = tl.load(ap, mask=mask_a, other=0.0)
        bt = tl.load(bp, mask=mask_b, other=0.0)
        if BACKWARD:
            gain = tl.load(gates + READ * plane + start + place)
            gain_n = gain
            if NORMALIZE:
                vector = row * chunks * L + start + place
                gain_n = gain * tl.load(d_overlap + vector)
                gain = gain * tl.load(inverse + vector)
        else:
            gain = tl.load(gates + WRITE * plane + start + place)
            gain_n = gain
        decay = tl.load(keep + chunk)
        if block == 0:
            if PHASE != PIECE:
                here = (row * chunks + chunk) * QK
                tl.store(states + here * V + tile, S.to(states.dtype.element_ty), mask=in_tile)
                if tile_v == 0:
                    tl.store(n_states + here + dq, tl.sum(n, 1) / 16.0, mask=in_q)
            else:
                whole *= decay
            S *= decay
            n *= decay
        column = tl.broadcast_to(gain_n[:, None], [BL, 16]).to(at.dtype)
        scaled = (at.to(tl.float32) * gain[None, :]).to(at.dtype)
        S = tl.dot(scaled, bt, S, input_precision=PRECISION)
        if NORMALIZE or not BACKWARD:
            n = tl.dot(at, column, n, input_precision=PRECISION)

    if PHASE == PIECE:
        piece = row * segments + segment
        tl.store(pieces_c + piece * (QK * V) + tile, S, mask=in_tile)
        if tile_v == 0:
            tl.store(pieces_n + piece * QK + dq, tl.sum(n, 1) / 16.0, mask=in_q)
            if tile_q == 0:
                tl.store(pieces_keep + piece, whole)
    elif STORE_LAST:
        if segment == segments - 1:
            tl.store(last_c + row * (QK * V) + tile, S, mask=in_tile)
            if tile_v == 0:
                tl.store(last_n + row * QK + dq, tl.sum(n, 1) / 16.0, mask=in_q)
