"""The sLSTM's time loop on Triton: forward and backward, weights resident or streamed.

Resident: one program has a head and BATCH rows, and keeps the four [D, D] recurrent matrices for
all steps. Streamed: a program has WIDTH columns of a head and BATCH rows, and reads its columns of
the matrices at every step, from the L2 cache. With all columns in one program (tiles = 1) one
launch does all steps; otherwise the host launches one step at a time, since the columns of a step
need all columns of the step before.

Row r of the batch, time t, gate g, head n, column j are at ((r steps + t) 4 + g) heads d + n d + j
of pre-activations, and without g of what has no gates. States are float32 [batch, heads, d]. All
sizes are run-time arguments: no length or batch compiles anything anew. Gates in the order
i, f, z, o. bf16 only feeds the products; everything else is float32.
"""

import triton
import triton.language as tl

from xlstm_kernels.slstm.triton.cell import (
    cell,
    cell_gradient,
    load_gates,
    load_matrices,
    load_wide,
    product,
    store_gates,
)

# Vary without recompilation; heads and d belong to a model, and loads are wide where 16 divides d.
SIZES = ["batch", "steps"]
SIZES_AND_RANGE = [*SIZES, "first", "last"]


@triton.jit
def forward_step(
    b_i, b_f, b_z, b_o, b_c, b_n, b_m, out, acts, decays, cs, ns, o_token, o_gates, stride_gate,
    m_tile, SIGMOID: tl.constexpr,
):  # fmt: skip
    """h, c, n, m after a step of a tile, from its pre-activations; stores all but the states."""
    tl.store(cs + o_token, b_c, mask=m_tile)
    tl.store(ns + o_token, b_n, mask=m_tile)
    b_h, b_c, b_n, b_m, b_write, b_closing, b_z, b_o, b_decay = cell(
        b_i, b_f, b_z, b_o, b_c, b_n, b_m, SIGMOID
    )
    tl.store(out + o_token, b_h.to(out.dtype.element_ty), mask=m_tile)
    store_gates(acts + o_gates, stride_gate, b_write, b_closing, b_z, b_o, m_tile)
    tl.store(decays + o_token, b_decay, mask=m_tile)
    return b_h, b_c, b_n, b_m


@triton.jit
def load_kept(d_out, acts, decays, cs, ns, o_token, o_gates, stride_gate, m_tile):
    """What `backward_step` takes of a tile: the token's own gradient, and what was kept of it."""
    b_write, b_closing, b_z, b_o = load_gates(acts + o_gates, stride_gate, m_tile)
    b_decay = tl.load(decays + o_token, mask=m_tile, other=1.0)
    b_n = tl.load(ns + o_token, mask=m_tile, other=1.0)
    b_out, b_c = load_wide(d_out + o_token, m_tile), load_wide(cs + o_token, m_tile)
    return b_out, b_write, b_closing, b_z, b_o, b_decay, b_c, b_n


@triton.jit
def backward_step(b_dh, b_dc, b_dn, kept, d_preacts, o_gates, stride_gate, m_tile):
    """Gradients of the gates of a tile, which it stores, and of c and n before a step.

    `b_dh` is what the steps after it leave, without this token's own gradient.
    """
    b_out, b_write, b_closing, b_z, b_o, b_decay, b_c, b_n = kept
    b_di, b_df, b_dz, b_do, b_dc, b_dn = cell_gradient(
        b_dh + b_out, b_dc, b_dn, b_write, b_closing, b_z, b_o, b_decay, b_c, b_n
    )
    store_gates(d_preacts + o_gates, stride_gate, b_di, b_df, b_dz, b_do, m_tile)
    return b_di, b_df, b_dz, b_do, b_dc, b_dn


@triton.jit(do_not_specialize=SIZES)
def forward_resident(
    preacts, weight, bias, starts, h_state, c_state, n_state, m_state, out, acts, decays, cs, ns,
    batch, steps, heads, d,
    SIGMOID: tl.constexpr, PRECISION: tl.constexpr, BATCH: tl.constexpr, D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """All steps of one head and BATCH rows. States in and out; cs, ns before each step."""
    i_program = tl.program_id(0).to(tl.int64)
    # [BATCH]
    i_head, o_row = i_program % heads, i_program // heads * BATCH + tl.arange(0, BATCH)
    # [D]
    o_column, o_inner = tl.arange(0, D), tl.arange(0, D)
    m_column = o_column < d
    # [BATCH, D]
    m_tile = (o_row < batch)[:, None] & m_column[None, :]
    stride_gate = heads * d  # of one token
    stride_matrix = heads * d * d
    # [D, D]
    p_R = weight + i_head * d * d + o_inner[:, None] * d + o_column[None, :]
    m_R = (o_inner < d)[:, None] & m_column[None, :]
    b_Ri, b_Rf, b_Rz, b_Ro = load_matrices(p_R, stride_matrix, m_R)
    # [1, D]
    o_head = i_head * d + o_column
    b_bias_i = load_wide(bias + o_head, m_column)[None, :]
    b_bias_f = load_wide(bias + stride_gate + o_head, m_column)[None, :]
    b_bias_z = load_wide(bias + 2 * stride_gate + o_head, m_column)[None, :]
    b_bias_o = load_wide(bias + 3 * stride_gate + o_head, m_column)[None, :]
    # [BATCH, D]
    o_state = o_row[:, None] * stride_gate + o_head[None, :]
    b_h = load_wide(h_state + o_state, m_tile)
    b_c, b_n = load_wide(c_state + o_state, m_tile), load_wide(n_state + o_state, m_tile)
    b_m = load_wide(m_state + o_state, m_tile)
    for t in tl.range(0, steps, num_stages=STAGES):
        # [BATCH]
        o_t = o_row * steps + t
        # [BATCH, D]
        o_token = o_t[:, None] * stride_gate + o_head[None, :]
        o_gates = o_t[:, None] * (4 * stride_gate) + o_head[None, :]
        b_xi, b_xf, b_xz, b_xo = load_gates(preacts + o_gates, stride_gate, m_tile)
        if starts is not None:
            m_start = (tl.load(starts + o_t, mask=o_row < batch, other=0) != 0)[:, None]
            b_h = tl.where(m_start, 0.0, b_h)
            b_m = tl.where(m_start, -float("inf"), b_m)
        b_left = b_h.to(weight.dtype.element_ty)
        b_i = product(b_left, b_Ri, PRECISION) + (b_xi + b_bias_i)
        b_f = product(b_left, b_Rf, PRECISION) + (b_xf + b_bias_f)
        b_z = product(b_left, b_Rz, PRECISION) + (b_xz + b_bias_z)
        b_o = product(b_left, b_Ro, PRECISION) + (b_xo + b_bias_o)
        b_h, b_c, b_n, b_m = forward_step(
            b_i, b_f, b_z, b_o, b_c, b_n, b_m, out, acts, decays, cs, ns, o_token, o_gates,
            stride_gate, m_tile, SIGMOID,
        )  # fmt: skip
    tl.store(h_state + o_state, b_h, mask=m_tile)
    tl.store(c_state + o_state, b_c, mask=m_tile)
    tl.store(n_state + o_state, b_n, mask=m_tile)
    tl.store(m_state + o_state, b_m, mask=m_tile)


@triton.jit(do_not_specialize=SIZES)
def backward_resident(
    d_out, weight, starts, acts, decays, cs, ns, d_h_state, d_c_state, d_n_state, d_preacts,
    batch, steps, heads, d,
    PRECISION: tl.constexpr, BATCH: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All steps of one head and BATCH rows, backwards. State gradients: last to first."""
    i_program = tl.program_id(0).to(tl.int64)
    # [BATCH]
    i_head, o_row = i_program % heads, i_program // heads * BATCH + tl.arange(0, BATCH)
    # [D]
    o_column, o_inner = tl.arange(0, D), tl.arange(0, D)
    m_column = o_column < d
    # [BATCH, D]
    m_tile = (o_row < batch)[:, None] & m_column[None, :]
    stride_gate = heads * d
    stride_matrix = heads * d * d
    # [D, D], transposed
    p_R = weight + i_head * d * d + o_inner[:, None] + o_column[None, :] * d
    m_R = (o_inner < d)[:, None] & m_column[None, :]
    b_Ri, b_Rf, b_Rz, b_Ro = load_matrices(p_R, stride_matrix, m_R)
    o_head = i_head * d + o_column
    # [BATCH, D]
    o_state = o_row[:, None] * stride_gate + o_head[None, :]
    b_dh = load_wide(d_h_state + o_state, m_tile)
    b_dc, b_dn = load_wide(d_c_state + o_state, m_tile), load_wide(d_n_state + o_state, m_tile)
    for step in tl.range(0, steps, num_stages=STAGES):
        # [BATCH]
        o_t = o_row * steps + (steps - 1 - step)
        # [BATCH, D]
        o_token = o_t[:, None] * stride_gate + o_head[None, :]
        o_gates = o_t[:, None] * (4 * stride_gate) + o_head[None, :]
        kept = load_kept(d_out, acts, decays, cs, ns, o_token, o_gates, stride_gate, m_tile)
        b_di, b_df, b_dz, b_do, b_dc, b_dn = backward_step(
            b_dh, b_dc, b_dn, kept, d_preacts, o_gates, stride_gate, m_tile
        )
        # Rounded as the products take them.
        b_di, b_df = b_di.to(weight.dtype.element_ty), b_df.to(weight.dtype.element_ty)
        b_dz, b_do = b_dz.to(weight.dtype.element_ty), b_do.to(weight.dtype.element_ty)
        b_dh = product(b_di, b_Ri, PRECISION) + product(b_df, b_Rf, PRECISION)
        b_dh += product(b_dz, b_Rz, PRECISION) + product(b_do, b_Ro, PRECISION)
        if starts is not None:
            m_start = tl.load(starts + o_t, mask=o_row < batch, other=0) != 0
            b_dh = tl.where(m_start[:, None], 0.0, b_dh)
    tl.store(d_h_state + o_state, b_dh, mask=m_tile)
    tl.store(d_c_state + o_state, b_dc, mask=m_tile)
    tl.store(d_n_state + o_state, b_dn, mask=m_tile)


@triton.jit
def recurrent_sums(
    h, weight, m_row, o_row, i_column, i_head, stride_gate, stride_matrix, d,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BATCH: tl.constexpr, WIDTH: tl.constexpr,
    INNER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h @ R of the four gates, [BATCH, WIDTH] each, for the i_column-th WIDTH columns of a head.

    Products of OPERANDs, summed in float32. Rows outside m_row are zeros. The gates share a
    product: where no warp has all four of a column, each comes out in the layout that loads and
    stores have, and nothing after it has to be brought there.
    """
    # [4 WIDTH], gate after gate
    o_all = tl.arange(0, 4 * WIDTH)
    o_mixed = i_column * WIDTH + o_all % WIDTH
    b_all = tl.zeros([BATCH, 4 * WIDTH], tl.float32)
    for k in tl.range(0, d, INNER, num_stages=STAGES):
        # [INNER]
        o_inner = k + tl.arange(0, INNER)
        # [BATCH, INNER]
        b_left = load_wide(
            h + i_head * d + o_row[:, None] * stride_gate + o_inner[None, :],
            m_row[:, None] & (o_inner < d)[None, :],
        ).to(OPERAND)
        # [INNER, 4 WIDTH]
        p_R = weight + i_head * d * d + o_inner[:, None] * d
        p_R = p_R + (o_all // WIDTH * stride_matrix + o_mixed)[None, :]
        m_R = (o_inner < d)[:, None] & (o_mixed < d)[None, :]
        b_all += product(b_left, tl.load(p_R, mask=m_R, other=0.0).to(OPERAND), PRECISION)
    # [BATCH, WIDTH, 2, 2], the gates i, f and z, o in the last two
    b_even, b_odd = tl.split(tl.permute(tl.reshape(b_all, [BATCH, 2, 2, WIDTH]), (0, 3, 1, 2)))
    b_i, b_z = tl.split(b_even)
    b_f, b_o = tl.split(b_odd)
    return b_i, b_f, b_z, b_o


@triton.jit(do_not_specialize=SIZES_AND_RANGE)
def forward_streamed(
    preacts, weight, bias, starts, h_states, c_state, n_state, m_state, out, acts, decays, cs, ns,
    batch, steps, heads, d, first, last,
    SIGMOID: tl.constexpr, PRECISION: tl.constexpr, BATCH: tl.constexpr, WIDTH: tl.constexpr,
    INNER: tl.constexpr, APART: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Steps first to before last of BATCH rows of a head: all columns, or if APART WIDTH of them.

    h_states [2, batch, heads, d]: h before step t is in part t % 2, h after it goes to the other,
    so that nothing overwrites what is still to be read. States stay in memory between steps:
    together with the sums of a product they would not fit the registers.
    """
    i_program = tl.program_id(0).to(tl.int64)
    i_head, i_rows, i_tile, tiles = i_program % heads, i_program // heads, 0, tl.cdiv(d, WIDTH)
    if APART:
        i_tile, i_rows = (i_rows % tiles).to(tl.int32), i_rows // tiles
        tiles = i_tile + 1
    # [BATCH]
    o_row = i_rows * BATCH + tl.arange(0, BATCH)
    stride_gate = heads * d
    stride_matrix = heads * d * d
    stride_part = tl.cast(batch, tl.int64) * stride_gate
    for t in range(first, last):
        # [BATCH]
        o_t = o_row * steps + t
        if starts is not None:
            m_known = (tl.load(starts + o_t, mask=o_row < batch, other=0) == 0)[:, None]
        p_h = h_states + (t % 2) * stride_part
        for i_column in range(i_tile, tiles):
            # [WIDTH]
            o_column = i_column * WIDTH + tl.arange(0, WIDTH)
            m_column = o_column < d
            # [BATCH, WIDTH]
            m_tile = (o_row < batch)[:, None] & m_column[None, :]
            o_head = i_head * d + o_column
            o_gates = o_t[:, None] * (4 * stride_gate) + o_head[None, :]
            o_state = o_row[:, None] * stride_gate + o_head[None, :]
            o_token = o_t[:, None] * stride_gate + o_head[None, :]
            # These loads run during the products; after them each would be waited for.
            b_xi, b_xf, b_xz, b_xo = load_gates(preacts + o_gates, stride_gate, m_tile)
            b_xi += load_wide(bias + o_head, m_column)[None, :]
            b_xf += load_wide(bias + stride_gate + o_head, m_column)[None, :]
            b_xz += load_wide(bias + 2 * stride_gate + o_head, m_column)[None, :]
            b_xo += load_wide(bias + 3 * stride_gate + o_head, m_column)[None, :]
            b_m = tl.load(m_state + o_state, mask=m_tile, other=0.0)
            b_c, b_n = load_wide(c_state + o_state, m_tile), load_wide(n_state + o_state, m_tile)
            b_i, b_f, b_z, b_o = recurrent_sums(
                p_h, weight, o_row < batch, o_row, i_column, i_head, stride_gate,
                stride_matrix, d, preacts.dtype.element_ty, PRECISION, BATCH, WIDTH, INNER, STAGES,
            )  # fmt: skip
            if starts is not None:
                # Not in the loads of h, which would wait for `starts`.
                b_i, b_f = tl.where(m_known, b_i, 0.0), tl.where(m_known, b_f, 0.0)
                b_z, b_o = tl.where(m_known, b_z, 0.0), tl.where(m_known, b_o, 0.0)
                b_m = tl.where(m_known, b_m, -float("inf"))
            b_i, b_f, b_z, b_o = b_i + b_xi, b_f + b_xf, b_z + b_xz, b_o + b_xo
            b_h, b_c, b_n, b_m = forward_step(
                b_i, b_f, b_z, b_o, b_c, b_n, b_m, out, acts, decays, cs, ns, o_token, o_gates,
                stride_gate, m_tile, SIGMOID,
            )  # fmt: skip
            tl.store(m_state + o_state, b_m, mask=m_tile)
            tl.store(c_state + o_state, b_c, mask=m_tile)
            tl.store(n_state + o_state, b_n, mask=m_tile)
            tl.store(h_states + ((t + 1) % 2) * stride_part + o_state, b_h, mask=m_tile)
        tl.debug_barrier()  # the next step reads what other threads have stored


@triton.jit(do_not_specialize=SIZES_AND_RANGE)
def backward_streamed(
    d_out, weight, starts, acts, decays, cs, ns, d_h_last, d_h_first, d_c_state, d_n_state,
    d_preacts, batch, steps, heads, d, first, last,
    PRECISION: tl.constexpr, BATCH: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr,
    APART: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Steps first to before last, counted from the end; columns as in `forward_streamed`.

    Each step takes d_h from the gate gradients of the step after it, which d_preacts holds; step
    number `steps` comes before the first token and only gives d_h_first.
    """
    i_program = tl.program_id(0).to(tl.int64)
    i_head, i_rows, i_tile, tiles = i_program % heads, i_program // heads, 0, tl.cdiv(d, WIDTH)
    if APART:
        i_tile, i_rows = (i_rows % tiles).to(tl.int32), i_rows // tiles
        tiles = i_tile + 1
    # [BATCH]
    o_row = i_rows * BATCH + tl.arange(0, BATCH)
    stride_gate = heads * d
    stride_matrix = heads * d * d
    R = weight + i_head * d * d
    for step in range(first, last):
        t = steps - 1 - step
        # [BATCH]
        o_after = o_row * steps + (t + 1)
        m_after = (o_row < batch) & (step > 0)
        if starts is not None:
            m_known = (tl.load(starts + o_after, mask=m_after, other=0) == 0)[:, None]
        for i_column in range(i_tile, tiles):
            # [WIDTH]
            o_column = i_column * WIDTH + tl.arange(0, WIDTH)
            m_column = o_column < d
            # [BATCH, WIDTH]
            m_tile = (o_row < batch)[:, None] & m_column[None, :]
            m_token = m_tile & (t >= 0)
            o_t = o_row * steps + t
            o_head = i_head * d + o_column
            o_state = o_row[:, None] * stride_gate + o_head[None, :]
            o_token = o_t[:, None] * stride_gate + o_head[None, :]
            o_gates = o_t[:, None] * (4 * stride_gate) + o_head[None, :]
            # These loads run during the products; after them each would be waited for.
            kept = load_kept(d_out, acts, decays, cs, ns, o_token, o_gates, stride_gate, m_token)
            b_dc = load_wide(d_c_state + o_state, m_token)
            b_dn = load_wide(d_n_state + o_state, m_token)
            b_last = load_wide(d_h_last + o_state, m_tile & (step == 0))
            # What each gate adds to d_h, [4, BATCH, WIDTH]
            b_parts = tl.zeros([4, BATCH, WIDTH], tl.float32)
            o_gate = tl.arange(0, 4)[:, None, None]
            for k in tl.range(0, d, INNER, num_stages=STAGES):
                # [INNER]
                o_inner = k + tl.arange(0, INNER)
                # [4, BATCH, INNER]
                p_d = d_preacts + o_after[None, :, None] * (4 * stride_gate)
                p_d = p_d + o_gate * stride_gate + (i_head * d + o_inner)[None, None, :]
                m_d = m_after[None, :, None] & (o_inner < d)[None, None, :]
                # [4, INNER, WIDTH], transposed
                p_R = R + o_gate * stride_matrix + o_inner[None, :, None]
                p_R = p_R + o_column[None, None, :] * d
                m_R = (o_inner < d)[None, :, None] & m_column[None, None, :]
                b_d = tl.load(p_d, mask=m_d, other=0.0)
                b_parts += product(b_d, tl.load(p_R, mask=m_R, other=0.0), PRECISION)
            b_dh = tl.sum(b_parts, 0)
            if starts is not None:
                # Not in the loads of the products, which would wait for `starts`.
                b_dh = tl.where(m_known, b_dh, 0.0)
            b_dh += b_last
            tl.store(d_h_first + o_state, b_dh, mask=m_tile & (t < 0))
            _, _, _, _, b_dc, b_dn = backward_step(
                b_dh, b_dc, b_dn, kept, d_preacts, o_gates, stride_gate, m_token
            )
            tl.store(d_c_state + o_state, b_dc, mask=m_token)
            tl.store(d_n_state + o_state, b_dn, mask=m_token)
        tl.debug_barrier()  # the next step reads what other threads have stored
