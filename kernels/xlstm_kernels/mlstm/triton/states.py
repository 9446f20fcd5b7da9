"""The states (C, n) between chunks, and their gradients: one kernel, run forward or backward.

Forward, the state before a chunk is stored and the chunk is written into it:
S <- g S + (a k)^T v. The gradient of the state after a chunk obeys the same recurrence from the
last chunk to the first: S <- g S + (b q / normalizer)^T d_h. Rows of n ride along as products with
one column. The weights a, b and g of the gates are those of `gates`.
"""

import triton
import triton.language as tl

from xlstm_kernels.mlstm.triton.gates import A_BAR, B_BAR, INVERSE

# What a launch does with the segments of the sequence.
WHOLE, LOCAL, RESUME = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def states_kernel(
    a, b, gates, g_bar, d_nq, first_c, first_n, states, n_states, last_c, last_n,
    segment_c, segment_n, segment_g,
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
    where the tiles alone do not fill a GPU: LOCAL finds what each segment writes and its decay,
    RESUME adds up the segments before its own (after it, backward) and goes on as WHOLE does.
    """
    i_program = tl.program_id(0)
    i_v = i_program % v_tiles
    i_q = (i_program // v_tiles) % q_tiles
    i_program = i_program // (v_tiles * q_tiles)
    i_segment = i_program % segments  # in the order of processing
    i_row = (i_program // segments).to(tl.int64)
    i_batch, i_head = i_row // heads, i_row % heads
    # [BQ], [BV]
    o_q = i_q * BQ + tl.arange(0, BQ)
    o_v = i_v * BV + tl.arange(0, BV)
    m_q, m_v = o_q < QK, o_v < V
    # [BQ, BV]
    m_state = m_q[:, None] & m_v[None, :]
    o_state = o_q[:, None] * V + o_v[None, :]
    a += i_batch * stride_ab + i_head * stride_ah
    b += i_batch * stride_bb + i_head * stride_bh
    gates += i_row * chunks * L
    g_bar += i_row * chunks

    # [BQ, BV]
    if PHASE != LOCAL and first_c is not None:
        b_C = tl.load(first_c + i_row * (QK * V) + o_state, mask=m_state, other=0.0).to(tl.float32)
    else:
        b_C = tl.zeros([BQ, BV], tl.float32)
    # [BQ, 16]: all columns are equal, since a product needs 16 of them
    if PHASE != LOCAL and first_n is not None:
        b_n = tl.load(first_n + i_row * QK + o_q, mask=m_q, other=0.0).to(tl.float32)
        b_n = tl.broadcast_to(b_n[:, None], [BQ, 16])
    else:
        b_n = tl.zeros([BQ, 16], tl.float32)
    if PHASE == RESUME:
        for i_earlier in range(i_segment):
            i_part = i_row * (segments - 1) + i_earlier
            b_g = tl.load(segment_g + i_part)
            b_C = b_C * b_g + tl.load(
                segment_c + i_part * (QK * V) + o_state, mask=m_state, other=0.0
            )
            # [BQ]
            b_more = tl.load(segment_n + i_part * QK + o_q, mask=m_q, other=0.0)
            b_n = b_n * b_g + b_more[:, None]

    per_chunk: tl.constexpr = L // BL
    begin = i_segment * chunks_per_segment
    end = tl.minimum(begin + chunks_per_segment, chunks)
    b_segment_g = 1.0  # decay over the segment
    for step in tl.range(begin * per_chunk, end * per_chunk, num_stages=STAGES):
        i_chunk = step // per_chunk
        if BACKWARD:
            i_chunk = chunks - 1 - i_chunk
        i_tile = step % per_chunk
        start = i_chunk * L + i_tile * BL
        o_l = tl.arange(0, BL)
        rows_left = s - start
        # [BQ, BL], [BL, BV]
        p_a = a + start.to(tl.int64) * stride_as + o_l[None, :] * stride_as + o_q[:, None]
        p_b = b + start.to(tl.int64) * stride_bs + o_l[:, None] * stride_bs + o_v[None, :]
        m_a, m_b = m_q[:, None], m_v[None, :]
        if not EVEN_S:
            m_a = m_a & (o_l < rows_left)[None, :]
            m_b = m_b & (o_l < rows_left)[:, None]
        b_a = tl.load(p_a, mask=m_a, other=0.0)
        b_b = tl.load(p_b, mask=m_b, other=0.0)
        # [BL]
        if BACKWARD:
            b_gain = tl.load(gates + B_BAR * plane + start + o_l)
            b_gain_n = b_gain
            if NORMALIZE:
                o_t = i_row * chunks * L + start + o_l
                b_gain_n = b_gain * tl.load(d_nq + o_t)
                b_gain = b_gain * tl.load(gates + INVERSE * plane + start + o_l)
        else:
            b_gain = tl.load(gates + A_BAR * plane + start + o_l)
            b_gain_n = b_gain
        b_g = tl.load(g_bar + i_chunk)
        if i_tile == 0:
            if PHASE != LOCAL:
                o_chunk = (i_row * chunks + i_chunk) * QK
                p_state = states + o_chunk * V + o_state
                tl.store(p_state, b_C.to(states.dtype.element_ty), mask=m_state)
                if i_v == 0:
                    tl.store(n_states + o_chunk + o_q, tl.sum(b_n, 1) / 16.0, mask=m_q)
            else:
                b_segment_g *= b_g
            b_C *= b_g
            b_n *= b_g
        # [BL, 16]
        b_column = tl.broadcast_to(b_gain_n[:, None], [BL, 16]).to(b_a.dtype)
        b_scaled = (b_a.to(tl.float32) * b_gain[None, :]).to(b_a.dtype)
        b_C = tl.dot(b_scaled, b_b, b_C, input_precision=PRECISION)
        if NORMALIZE or not BACKWARD:
            b_n = tl.dot(b_a, b_column, b_n, input_precision=PRECISION)

    if PHASE == LOCAL:
        i_part = i_row * segments + i_segment
        tl.store(segment_c + i_part * (QK * V) + o_state, b_C, mask=m_state)
        if i_v == 0:
            tl.store(segment_n + i_part * QK + o_q, tl.sum(b_n, 1) / 16.0, mask=m_q)
            if i_q == 0:
                tl.store(segment_g + i_part, b_segment_g)
    elif STORE_LAST:
        if i_segment == segments - 1:
            tl.store(last_c + i_row * (QK * V) + o_state, b_C, mask=m_state)
            if i_v == 0:
                tl.store(last_n + i_row * QK + o_q, tl.sum(b_n, 1) / 16.0, mask=m_q)
