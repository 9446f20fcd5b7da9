"""The sLSTM's time loop as one launch of programs that wait for each other at every step.

A group of programs shares a head and BATCH rows. Each has WIDTH columns of the head, keeps their
recurrent weights and states for all steps, and meets the others of its group once a step:

- Forward, a program needs the whole head's h. It writes its columns of h and reads all of them
  after the meeting. The weights are [D, 4 WIDTH]: one product gives all gates of its columns.
- Backward, it has the gate gradients of its columns, and their product with [4 WIDTH, D] is its
  part of the whole head's d_h. It writes that, and adds the parts of all programs for its own
  columns after the meeting, in a fixed order.

What is exchanged has two places that take turns, so that one meeting a step is enough: who writes
a place again has met everybody after they read it (`tests/kernels/slstm/test_barrier.py` explores
every order). All programs must run at the same time, which the launch asks the driver for.

A launch of one step has no meeting: so Triton's interpreter, which runs programs one after the
other, tests these kernels. The meeting itself has run nowhere yet.
"""

import triton
import triton.language as tl

from xlstm_kernels.slstm.triton.cell import load_wide, product
from xlstm_kernels.slstm.triton.kernels import (
    SIZES_AND_RANGE,
    backward_step,
    forward_step,
    load_kept,
)


@triton.jit
def meet(arrived, count):
    """Wait until `count` arrivals were counted in all, this program's next one included.

    What any thread of the group wrote before is seen by every thread of it after.
    """
    tl.debug_barrier()  # all threads of this program have written
    tl.atomic_add(arrived, 1, sem="release", scope="gpu")
    while tl.atomic_add(arrived, 0, sem="acquire", scope="gpu") < count:
        pass
    tl.debug_barrier()


@triton.jit
def gate_tiles(b_all, BATCH: tl.constexpr, WIDTH: tl.constexpr):
    """[BATCH, 4 WIDTH] with the gates i, z, f, o of a column side by side: as i, f, z, o."""
    b_even, b_odd = tl.split(tl.reshape(b_all, [BATCH, WIDTH, 2, 2]))
    b_i, b_f = tl.split(b_even)
    b_z, b_o = tl.split(b_odd)
    return b_i, b_f, b_z, b_o


@triton.jit
def mixed_columns(i_tile, WIDTH: tl.constexpr):
    """Gate and column of the 4 WIDTH positions of `gate_tiles`."""
    o_mixed = tl.arange(0, 4 * WIDTH)
    return o_mixed % 2 * 2 + o_mixed // 2 % 2, i_tile * WIDTH + o_mixed // 4


@triton.jit(do_not_specialize=SIZES_AND_RANGE)
def forward_persistent(
    preacts, weight, bias, starts, h_parts, h_state, c_state, n_state, m_state, out, acts, decays,
    cs, ns, arrived, batch, steps, heads, d, first, last,
    SIGMOID: tl.constexpr, PRECISION: tl.constexpr, BATCH: tl.constexpr, WIDTH: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Steps first to before last; grid: programs of a group, heads, blocks of rows.

    h_parts [2, batch, heads, d], in the dtype of the products: h before step t is in part t % 2.
    `arrived` has a zero for each group.
    """
    i_program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(d, WIDTH)
    i_tile, i_group = (i_program % tiles).to(tl.int32), i_program // tiles
    # [BATCH]
    i_head, o_row = i_group % heads, i_group // heads * BATCH + tl.arange(0, BATCH)
    stride_gate, stride_matrix = heads * d, heads * d * d
    stride_part = tl.cast(batch, tl.int64) * stride_gate
    # [D / 2], [4 WIDTH]: two halves, since a product has its whole left operand in registers
    o_low = tl.arange(0, D // 2)
    o_high = D // 2 + o_low
    o_gate, o_mixed = mixed_columns(i_tile, WIDTH)
    p_R = weight + i_head * d * d + (o_gate * stride_matrix + o_mixed)[None, :]
    m_R = (o_mixed < d)[None, :]
    b_low = tl.load(p_R + o_low[:, None] * d, mask=(o_low < d)[:, None] & m_R, other=0.0)
    b_high = tl.load(p_R + o_high[:, None] * d, mask=(o_high < d)[:, None] & m_R, other=0.0)
    b_bias = load_wide(bias + o_gate * stride_gate + i_head * d + o_mixed, o_mixed < d)[None, :]
    # [WIDTH]
    o_column = i_tile * WIDTH + tl.arange(0, WIDTH)
    # [BATCH, WIDTH]
    m_tile = (o_row < batch)[:, None] & (o_column < d)[None, :]
    o_head = i_head * d + o_column
    o_state = o_row[:, None] * stride_gate + o_head[None, :]
    b_h = load_wide(h_state + o_state, m_tile)
    b_c, b_n = load_wide(c_state + o_state, m_tile), load_wide(n_state + o_state, m_tile)
    b_m = load_wide(m_state + o_state, m_tile)
    # [BATCH, D / 2], [BATCH, 4 WIDTH]
    o_left = o_row[:, None] * stride_gate + (i_head * d + o_low)[None, :]
    o_x = (o_gate * stride_gate + i_head * d + o_mixed)[None, :]
    m_x = (o_row < batch)[:, None] & (o_mixed < d)[None, :]
    for t in range(first, last):
        # [BATCH]
        o_t = o_row * steps + t
        b_x = load_wide(preacts + o_t[:, None] * (4 * stride_gate) + o_x, m_x)
        m_known = o_row < batch
        if starts is not None:
            m_known = m_known & (tl.load(starts + o_t, mask=m_known, other=0) == 0)
            b_m = tl.where(m_known[:, None], b_m, -float("inf"))
        p_left = h_parts + (t % 2) * stride_part + o_left
        # Past the cache of this processor, where an older h may be.
        m_left = m_known[:, None] & (o_low < d)[None, :]
        b_left = tl.load(p_left, mask=m_left, other=0.0, cache_modifier=".cg")
        b_all = product(b_left, b_low, PRECISION)
        m_left = m_known[:, None] & (o_high < d)[None, :]
        b_left = tl.load(p_left + D // 2, mask=m_left, other=0.0, cache_modifier=".cg")
        b_all += product(b_left, b_high, PRECISION) + (b_x + b_bias)
        b_i, b_f, b_z, b_o = gate_tiles(b_all, BATCH, WIDTH)
        o_token = o_t[:, None] * stride_gate + o_head[None, :]
        o_gates = o_t[:, None] * (4 * stride_gate) + o_head[None, :]
        b_h, b_c, b_n, b_m = forward_step(
            b_i, b_f, b_z, b_o, b_c, b_n, b_m, out, acts, decays, cs, ns, o_token, o_gates,
            stride_gate, m_tile, SIGMOID,
        )  # fmt: skip
        p_next = h_parts + ((t + 1) % 2) * stride_part + o_state
        tl.store(p_next, b_h.to(h_parts.dtype.element_ty), mask=m_tile)
        if t + 1 < last:
            meet(arrived + i_group, tiles * (t + 1 - first))
    tl.store(h_state + o_state, b_h, mask=m_tile)
    tl.store(c_state + o_state, b_c, mask=m_tile)
    tl.store(n_state + o_state, b_n, mask=m_tile)
    tl.store(m_state + o_state, b_m, mask=m_tile)


@triton.jit
def added_parts(p_all, m_all, starts, o_row, batch, steps, t):
    """d_h after step t, [BATCH, WIDTH], from [TILES, BATCH, WIDTH] parts, in a fixed order.

    A document that starts at t + 1 leaves none.
    """
    # Past the cache of this processor, where older parts may be.
    b_dh = tl.sum(tl.load(p_all, mask=m_all, other=0.0, cache_modifier=".cg"), 0)
    if starts is not None:
        o_after = o_row * steps + (t + 1)
        m_known = (o_row < batch) & (t + 1 < steps)
        m_start = tl.load(starts + o_after, mask=m_known, other=0) != 0
        b_dh = tl.where(m_start[:, None], 0.0, b_dh)
    return b_dh


@triton.jit(do_not_specialize=SIZES_AND_RANGE)
def backward_persistent(
    d_out, weight, starts, acts, decays, cs, ns, parts, d_h_state, d_c_state, d_n_state, d_preacts,
    arrived, batch, steps, heads, d, first, last,
    PRECISION: tl.constexpr, BATCH: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Steps first to before last, counted from the end; grid as in `forward_persistent`.

    parts [2, groups, tiles, BATCH, D]: what each program's columns add to d_h. A launch begins with
    the sums of the step before it, but step 0 with d_h_state. The last launch is followed by one
    without a step (first = last = steps), which leaves d_h of the first state in d_h_state.
    """
    i_program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(d, WIDTH)
    i_tile, i_group = (i_program % tiles).to(tl.int32), i_program // tiles
    # [BATCH]
    i_head, o_row = i_group % heads, i_group // heads * BATCH + tl.arange(0, BATCH)
    stride_gate, stride_matrix = heads * d, heads * d * d
    stride_part = tl.num_programs(0).to(tl.int64) * BATCH * D
    # [D], [4 WIDTH]
    o_inner = tl.arange(0, D)
    o_gate, o_mixed = mixed_columns(i_tile, WIDTH)
    # [4 WIDTH, D]
    p_R = weight + i_head * d * d + (o_gate * stride_matrix + o_mixed)[:, None]
    m_R = (o_mixed < d)[:, None] & (o_inner < d)[None, :]
    b_R = tl.load(p_R + o_inner[None, :] * d, mask=m_R, other=0.0)
    # [WIDTH]
    o_column = i_tile * WIDTH + tl.arange(0, WIDTH)
    # [BATCH, WIDTH]
    m_tile = (o_row < batch)[:, None] & (o_column < d)[None, :]
    o_head = i_head * d + o_column
    o_state = o_row[:, None] * stride_gate + o_head[None, :]
    b_dc, b_dn = load_wide(d_c_state + o_state, m_tile), load_wide(d_n_state + o_state, m_tile)
    # [BATCH, D], [TILES, BATCH, WIDTH]
    o_line = tl.arange(0, BATCH)
    o_mine = i_program * (BATCH * D) + o_line[:, None] * D + o_inner[None, :]
    o_tile = tl.arange(0, TILES)
    o_all = (i_group * tiles + o_tile)[:, None, None] * (BATCH * D) + o_line[None, :, None] * D
    o_all = o_all + o_column[None, None, :]
    m_all = (o_tile < tiles)[:, None, None] & (o_column < d)[None, None, :]
    for step in range(first, last):
        t = steps - 1 - step
        p_all = parts + (step % 2) * stride_part + o_all
        b_dh = added_parts(p_all, m_all & (step > 0), starts, o_row, batch, steps, t)
        b_dh += load_wide(d_h_state + o_state, m_tile & (step == 0))
        o_t = o_row * steps + t
        o_token = o_t[:, None] * stride_gate + o_head[None, :]
        o_gates = o_t[:, None] * (4 * stride_gate) + o_head[None, :]
        kept = load_kept(d_out, acts, decays, cs, ns, o_token, o_gates, stride_gate, m_tile)
        b_di, b_df, b_dz, b_do, b_dc, b_dn = backward_step(
            b_dh, b_dc, b_dn, kept, d_preacts, o_gates, stride_gate, m_tile
        )
        b_all = tl.join(tl.join(b_di, b_df), tl.join(b_dz, b_do))
        b_all = tl.reshape(b_all, [BATCH, 4 * WIDTH]).to(weight.dtype.element_ty)
        b_part = product(b_all, b_R, PRECISION)
        tl.store(parts + ((step + 1) % 2) * stride_part + o_mine, b_part)
        if step + 1 < last:
            meet(arrived + i_group, tiles * (step + 1 - first))
    if first == last:
        p_all = parts + (last % 2) * stride_part + o_all
        b_dh = added_parts(p_all, m_all, starts, o_row, batch, steps, steps - 1 - last)
        tl.store(d_h_state + o_state, b_dh, mask=m_tile)
    else:
        tl.store(d_c_state + o_state, b_dc, mask=m_tile)
        tl.store(d_n_state + o_state, b_dn, mask=m_tile)
