"""Gates on Triton: everything that gates decide, in one launch, and their gradients, in another.

The stabilizer m depends on gates only, so it is known before the first product. All gate sums are
float64, as in the PyTorch implementation: they are small ([b, heads, s]), and a float32 sum of 64
closed gates (-15 each) would cost 1e-4 in every weight after them. Exponents leave as pairs of
float32 (value + remainder), so that the difference of two large sums is still exact to float32.

Vectors over time are padded to whole chunks, T = chunks * L, and need no masks: a padded token
decays nothing, and nothing reads or writes it. `gates` is float32 [GATE_PLANES, b * heads, T].
"""

import triton
import triton.language as tl

from xlstm_kernels.common.triton_extremes import larger, smaller

# Planes of `gates`, named as in Tiled Flash Linear Attention (arXiv 2503.14376). An entry of D is
# exp(TARGET of the row + SOURCE of the column); these exponents are in units of log 2.
TARGET, TARGET_REST = tl.constexpr(0), tl.constexpr(1)  # sums - m + log(qk_dim^-0.5)
SOURCE, SOURCE_REST = tl.constexpr(2), tl.constexpr(3)  # log_i - sums
B_BAR = tl.constexpr(4)  # weight of the state before the chunk, with qk_dim^-0.5
A_BAR = tl.constexpr(5)  # weight of a token in the state after the chunk
STABILIZER = tl.constexpr(6)  # m
# What the outputs leave beside them, where there is a normalizer.
INVERSE = tl.constexpr(7)  # 1 / normalizer
N_Q = tl.constexpr(8)  # n.q
GATE_PLANES = 9

# Planes of the partial gate gradients, float32 [GRADIENT_PLANES, x tiles, b * heads, T].
ROW, COLUMN_STATE, COLUMN_PAIRS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
INPUT, CORNER = tl.constexpr(3), tl.constexpr(4)
GRADIENT_PLANES = 5

LOG2E = tl.constexpr(1.4426950408889634)
ROUNDING = tl.constexpr(1.0)  # bound of exponents, see `mlstm/torch/decays.py`
CLOSED = tl.constexpr(-1e6)  # see `common/gates.py`
LARGE = tl.constexpr(1e38)  # two of these still add up to a float32


@triton.jit
def log_sigmoid(x):
    """Log of the sigmoid of a float64 tensor, without overflow."""
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def capped(x, cap):
    """cap * tanh(x / cap) of a float64 tensor."""
    e = tl.exp(-2.0 * tl.abs(x / cap))
    y = cap * (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def cap_slope(x, cap):
    """Derivative of `capped`."""
    e = tl.exp(-2.0 * tl.abs(x / cap))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def join_spans(total_a, best_a, total_b, best_b):
    """Max-plus composition: m -> max(total + m, best) of span a, then of span b."""
    return total_a + total_b, larger(best_a + total_b, best_b)


@triton.jit
def load_gates(
    igate, fgate, starts, o_t, m_t, stride_i, stride_f, stride_s, cap, EXP_GATE, BOUNDED, CAPPED
):
    """log f, log i (float64) and the start flags of the tokens o_t; closed input outside m_t."""
    b_f = tl.load(fgate + o_t * stride_f, mask=m_t, other=0.0).to(tl.float64)
    b_log_i = tl.load(igate + o_t * stride_i, mask=m_t, other=0.0).to(tl.float64)
    if CAPPED:
        b_f, b_log_i = capped(b_f, cap), capped(b_log_i, cap)
    b_log_f = log_sigmoid(tl.where(b_f < CLOSED, CLOSED, b_f))
    if EXP_GATE:  # an infinite gate has no weight: inf - inf
        b_log_i = tl.where(b_log_i == float("inf"), float("nan"), b_log_i)
    else:
        b_log_i = log_sigmoid(b_log_i)
    b_log_f = tl.where(m_t, b_log_f, 0.0)
    b_log_i = tl.where(m_t, b_log_i, -float("inf"))
    m_start = o_t < 0
    if BOUNDED:
        m_start = tl.load(starts + o_t * stride_s, mask=m_t, other=0) != 0
    return b_log_f, b_log_i, m_start


@triton.jit
def store_exponent(gates, i_plane, plane, o_t, b_exponent):
    """A float64 exponent of the tokens o_t as a float32 value and its remainder."""
    b_rounded = b_exponent.to(tl.float32)
    tl.store(gates + i_plane * plane + o_t, b_rounded)
    b_rest = (b_exponent - b_rounded.to(tl.float64)).to(tl.float32)
    tl.store(gates + (i_plane + 1) * plane + o_t, b_rest)


@triton.jit
def gates_kernel(
    igate, fgate, m0, starts, gates, g_bar, first, last_m,
    stride_ib, stride_ih, stride_is, stride_fb, stride_fh, stride_fs, stride_sb, stride_ss,
    heads, s, chunks, chunks_per_program, programs, log_scale, scale, plane, cap,
    L: tl.constexpr, PREFIX: tl.constexpr, EXP_GATE: tl.constexpr, CARRIED: tl.constexpr,
    BOUNDED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Decays of `chunks_per_program` chunks of one row; grid b * heads * programs.

    A program first reduces all gates before its own in blocks of PREFIX to the m that it starts
    from: reading the gates again is cheaper than a second launch. Writes `gates`, g_bar
    [rows, chunks] (decay of the state over a chunk), first int32 [rows, T] (place in its chunk of
    the last document start at or before a token, -1 if none; with BOUNDED) and last_m [rows],
    where it is asked for.
    """
    i_program = tl.program_id(0)
    i_row = (i_program // programs).to(tl.int64)
    i_part = i_program % programs
    i_batch, i_head = i_row // heads, i_row % heads
    igate += i_batch * stride_ib + i_head * stride_ih
    fgate += i_batch * stride_fb + i_head * stride_fh
    if BOUNDED:
        starts += i_batch * stride_sb
    gates += i_row * chunks * L
    first_chunk = i_part * chunks_per_program
    begin = tl.minimum(first_chunk * L, s)

    m = tl.full([], 0.0, tl.float64)
    if CARRIED and EXP_GATE:
        m = tl.load(m0 + i_row).to(tl.float64)
    if EXP_GATE:
        for start in range(0, begin, PREFIX):
            # [PREFIX]
            o_t = start + tl.arange(0, PREFIX)
            b_log_f, b_log_i, m_start = load_gates(
                igate, fgate, starts, o_t.to(tl.int64), o_t < begin, stride_is, stride_fs,
                stride_ss, cap, EXP_GATE, BOUNDED, CAPPED,
            )  # fmt: skip
            b_open_f = tl.where(m_start, 0.0, b_log_f)
            total = tl.sum(b_open_f, 0)
            b_after = total - tl.cumsum(b_open_f, 0)  # decay of what token t writes
            b_best = tl.where(o_t < begin, b_log_i + b_after, -float("inf"))
            if BOUNDED:
                last = tl.max(tl.where(m_start, o_t, -1), 0)
                b_best = tl.where(o_t == last, larger(b_log_f, b_log_i) + b_after, b_best)
                b_best = tl.where(o_t < last, -float("inf"), b_best)
                total = tl.where(last >= 0, -float("inf"), total)
            m = larger(total + m, tl.reduce(b_best, 0, larger))

    # [L]
    o_l = tl.arange(0, L)
    for i_chunk in range(first_chunk, tl.minimum(first_chunk + chunks_per_program, chunks)):
        o_t = i_chunk * L + o_l
        b_log_f, b_log_i, m_start = load_gates(
            igate, fgate, starts, o_t.to(tl.int64), o_t < s, stride_is, stride_fs, stride_ss,
            cap, EXP_GATE, BOUNDED, CAPPED,
        )  # fmt: skip
        m_before = m.to(tl.float32).to(tl.float64)
        if EXP_GATE:
            b_total = tl.where(m_start, -float("inf"), b_log_f)
            b_best = tl.where(m_start, larger(b_log_f, b_log_i), b_log_i)
            b_total, b_best = tl.associative_scan((b_total, b_best), 0, join_spans)
            b_exact = larger(b_total + m, b_best)
            m = tl.sum(tl.where(o_l == L - 1, b_exact, 0.0), 0)
            # Rounded before it is used, so that the returned m and C belong together.
            b_m = b_exact.to(tl.float32).to(tl.float64)
        else:
            b_m = tl.zeros([L], tl.float64)
        m_after = m.to(tl.float32).to(tl.float64)
        b_log_f = tl.where(m_start, 0.0, b_log_f)  # no weight crosses a boundary
        b_sums = tl.cumsum(b_log_f, 0)
        whole = tl.sum(b_log_f, 0)
        b_bar = tl.exp(smaller(b_sums - b_m + m_before, ROUNDING)) * scale
        a_bar = tl.exp(smaller(b_log_i - b_sums + whole - m_after, ROUNDING))
        g = tl.exp(smaller(whole + m_before - m_after, ROUNDING))
        if BOUNDED:
            b_latest = tl.associative_scan(tl.where(m_start, o_l, -1), 0, larger)
            last = tl.max(b_latest, 0)
            b_bar = tl.where(b_latest >= 0, 0.0, b_bar)
            a_bar = tl.where(o_l < last, 0.0, a_bar)
            g = tl.where(last >= 0, 0.0, g)
            tl.store(first + i_row * chunks * L + o_t, b_latest)
        b_target = (b_sums - b_m + log_scale) * LOG2E
        b_target = smaller(larger(b_target, -LARGE), LARGE)
        b_source = smaller(larger((b_log_i - b_sums) * LOG2E, -LARGE), LARGE)
        store_exponent(gates, TARGET, plane, o_t, b_target)
        store_exponent(gates, SOURCE, plane, o_t, b_source)
        tl.store(gates + B_BAR * plane + o_t, b_bar.to(tl.float32))
        tl.store(gates + A_BAR * plane + o_t, a_bar.to(tl.float32))
        tl.store(gates + STABILIZER * plane + o_t, b_m.to(tl.float32))
        tl.store(g_bar + i_row * chunks + i_chunk, g.to(tl.float32))
    if last_m is not None:
        if first_chunk + chunks_per_program >= chunks:
            tl.store(last_m + i_row, m.to(tl.float32))


@triton.jit
def gate_gradients_kernel(
    igate, fgate, first, g_bar, parts, across, d_igate, d_fgate,
    stride_ib, stride_ih, stride_is, stride_fb, stride_fh, stride_fs,
    heads, s, chunks, x_tiles, across_parts, plane, cap,
    L: tl.constexpr, EXP_GATE: tl.constexpr, BOUNDED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Gate gradients of one chunk from what `query_key_gradients_kernel` left; grid rows * chunks.

    A forget gate at t decays the pairs (source before t, target at or after t). Pairs inside one
    tile were summed directly (CORNER); the others are sums over whole rows minus whole columns:
    the usual reversed cumulative sum, but free of the diagonal, which would cancel badly.
    """
    i_program = tl.program_id(0)
    i_row = (i_program // chunks).to(tl.int64)
    i_chunk = i_program % chunks
    i_batch, i_head = i_row // heads, i_row % heads
    # [L]
    o_l = tl.arange(0, L)
    o_t = i_chunk * L + o_l
    o_row = i_row * chunks * L + o_t
    b_later = tl.zeros([L], tl.float64)
    b_earlier = tl.zeros([L], tl.float64)
    b_df = tl.zeros([L], tl.float64)  # of log f
    b_di = tl.zeros([L], tl.float64)  # of log i
    for i_x in range(x_tiles):
        p_part = parts + i_x * plane + o_row
        step = x_tiles * plane
        b_later += tl.load(p_part + ROW * step).to(tl.float64)
        b_later -= tl.load(p_part + COLUMN_PAIRS * step).to(tl.float64)
        b_earlier += tl.load(p_part + COLUMN_STATE * step).to(tl.float64)
        b_df += tl.load(p_part + CORNER * step).to(tl.float64)
        b_di += tl.load(p_part + INPUT * step).to(tl.float64)
    passed = tl.full([], 0.0, tl.float64)
    for i_part in range(across_parts):
        p_across = across + (i_row * chunks + i_chunk) * across_parts + i_part
        passed += tl.load(p_across).to(tl.float64)
    passed *= tl.load(g_bar + i_row * chunks + i_chunk).to(tl.float64)
    b_df += tl.sum(b_later, 0) - tl.cumsum(b_later, 0) + b_later
    b_df += tl.cumsum(b_earlier, 0) - b_earlier + passed
    if BOUNDED:
        b_df = tl.where(tl.load(first + o_row) == o_l, 0.0, b_df)
    m_t = o_t < s
    o_long = o_t.to(tl.int64)
    p_f = fgate + i_batch * stride_fb + i_head * stride_fh + o_long * stride_fs
    b_f = tl.load(p_f, mask=m_t, other=0.0).to(tl.float64)
    if CAPPED:
        b_df *= cap_slope(b_f, cap)
        b_f = capped(b_f, cap)
    b_df *= 1.0 / (1.0 + tl.exp(smaller(b_f, 700.0)))
    if CAPPED or not EXP_GATE:
        p_i = igate + i_batch * stride_ib + i_head * stride_ih + o_long * stride_is
        b_i = tl.load(p_i, mask=m_t, other=0.0).to(tl.float64)
        if CAPPED:
            b_di *= cap_slope(b_i, cap)
            b_i = capped(b_i, cap)
        if not EXP_GATE:
            b_di *= 1.0 / (1.0 + tl.exp(smaller(b_i, 700.0)))
    o_out = i_row * s + o_t
    tl.store(d_fgate + o_out, b_df.to(tl.float32).to(d_fgate.dtype.element_ty), mask=m_t)
    tl.store(d_igate + o_out, b_di.to(tl.float32).to(d_igate.dtype.element_ty), mask=m_t)
