"""Gates on Triton: everything that gates decide, in one launch, and their gradients, in another.

The stabilizer m depends on gates only, so it is known before the first product. All gate sums are
float64, as in the torch twin: they are small ([b, heads, s]), and a float32 sum of 64 closed gates
(-15 each) would cost 1e-4 in every weight after them. Exponents leave as pairs of float32
(value + remainder), so that the difference of two large sums is still exact to float32.

Vectors over time are padded to whole chunks, T = chunks * L, and need no masks: a padded token
decays nothing, and nothing reads or writes it. `gates` is float32 [GATE_PLANES, b * heads, T].
"""

import triton
import triton.language as tl

# Planes of `gates`; exponents in units of log 2.
TARGET, TARGET_REST = tl.constexpr(0), tl.constexpr(1)  # sums - m + log(qk_dim^-0.5)
SOURCE, SOURCE_REST = tl.constexpr(2), tl.constexpr(3)  # log_i - sums
READ = tl.constexpr(4)  # weight of the state before the chunk, with qk_dim^-0.5
WRITE = tl.constexpr(5)  # weight of a token in the state after the chunk
STABILIZER = tl.constexpr(6)  # m
GATE_PLANES = 7

# Planes of the partial gate gradients, float32 [GRADIENT_PLANES, x tiles, b * heads, T].
ROW, COLUMN_STATE, COLUMN_PAIRS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
INPUT, CORNER = tl.constexpr(3), tl.constexpr(4)
GRADIENT_PLANES = 5

LOG2E = tl.constexpr(1.4426950408889634)
ROUNDING = tl.constexpr(1.0)  # bound of exponents, see chunkwise_torch
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
    return total_a + total_b, tl.maximum(best_a + total_b, best_b)


@triton.jit
def larger(a, b):
    """Combine function of a running maximum."""
    return tl.maximum(a, b)


@triton.jit
def load_gates(
    igate, fgate, starts, t, valid, stride_i, stride_f, stride_s, cap, EXP_GATE, BOUNDED, CAPPED
):
    """log_f, log_i (float64) and the start flags of the tokens t; closed input if not valid."""
    f = tl.load(fgate + t * stride_f, mask=valid, other=0.0).to(tl.float64)
    log_i = tl.load(igate + t * stride_i, mask=valid, other=0.0).to(tl.float64)
    if CAPPED:
        f, log_i = capped(f, cap), capped(log_i, cap)
    log_f = log_sigmoid(f)
    if not EXP_GATE:
        log_i = log_sigmoid(log_i)
    log_f = tl.where(valid, log_f, 0.0)
    log_i = tl.where(valid, log_i, -float("inf"))
    start = t < 0
    if BOUNDED:
        start = tl.load(starts + t * stride_s, mask=valid, other=0) != 0
    return log_f, log_i, start


@triton.jit
def gates_kernel(
    igate, fgate, m0, starts, gates, keep, first, last_m,
    stride_ib, stride_ih, stride_is, stride_fb, stride_fh, stride_fs, stride_sb, stride_ss,
    heads, s, chunks, chunks_per_program, programs, log_scale, scale, plane, cap,
    L: tl.constexpr, PREFIX: tl.constexpr, EXP_GATE: tl.constexpr, CARRIED: tl.constexpr,
    BOUNDED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Decays of `chunks_per_program` chunks of one row; grid b * heads * programs.

    A program first reduces all gates before its own in blocks of PREFIX to the m that it starts
    from: reading the gates again is cheaper than a second launch. Writes `gates`, keep
    [rows, chunks] (decay of the state over a chunk), first int32 [rows, T] (place in its chunk of
    the last document start at or before a token, -1 if none; with BOUNDED) and last_m [rows].
    """
    pid = tl.program_id(0)
    row = (pid // programs).to(tl.int64)
    part = pid % programs
    batch, head = row // heads, row % heads
    igate += batch * stride_ib + head * stride_ih
    fgate += batch * stride_fb + head * stride_fh
    if BOUNDED:
        starts += batch * stride_sb
    gates += row * chunks * L
    first_chunk = part * chunks_per_program
    begin = tl.minimum(first_chunk * L, s)

    m = tl.full([], 0.0, tl.float64)
    if CARRIED and EXP_GATE:
        m = tl.load(m0 + row).to(tl.float64)
    if EXP_GATE:
        for block in range(0, begin, PREFIX):
            t = block + tl.arange(0, PREFIX)
            log_f, log_i, start = load_gates(
                igate, fgate, starts, t.to(tl.int64), t < begin, stride_is, stride_fs, stride_ss,
                cap, EXP_GATE, BOUNDED, CAPPED,
            )  # fmt: skip
            open_f = tl.where(start, 0.0, log_f)
            total = tl.sum(open_f, 0)
            after = total - tl.cumsum(open_f, 0)  # decay of what token t writes
            best = tl.where(t < begin, log_i + after, -float("inf"))
            if BOUNDED:
                last = tl.max(tl.where(start, t, -1), 0)
                best = tl.where(t == last, tl.maximum(log_f, log_i) + after, best)
                best = tl.where(t < last, -float("inf"), best)
                total = tl.where(last >= 0, -float("inf"), total)
            m = tl.maximum(total + m, tl.max(best, 0))

    place = tl.arange(0, L)
    for chunk in range(first_chunk, tl.minimum(first_chunk + chunks_per_program, chunks)):
        t = chunk * L + place
        log_f, log_i, start = load_gates(
            igate, fgate, starts, t.to(tl.int64), t < s, stride_is, stride_fs, stride_ss,
            cap, EXP_GATE, BOUNDED, CAPPED,
        )  # fmt: skip
        m_start = m.to(tl.float32).to(tl.float64)
        if EXP_GATE:
            total = tl.where(start, -float("inf"), log_f)
            best = tl.where(start, tl.maximum(log_f, log_i), log_i)
            total, best = tl.associative_scan((total, best), 0, join_spans)
            exact = tl.maximum(total + m, best)
            m = tl.sum(tl.where(place == L - 1, exact, 0.0), 0)
            # Rounded before it is used, so that the returned m and C belong together.
            m_all = exact.to(tl.float32).to(tl.float64)
        else:
            m_all = tl.zeros([L], tl.float64)
        m_end = m.to(tl.float32).to(tl.float64)
        log_f = tl.where(start, 0.0, log_f)  # no weight crosses a boundary
        sums = tl.cumsum(log_f, 0)
        whole = tl.sum(log_f, 0)
        read = tl.exp(tl.minimum(sums - m_all + m_start, ROUNDING)) * scale
        write = tl.exp(tl.minimum(log_i - sums + whole - m_end, ROUNDING))
        decay = tl.exp(tl.minimum(whole + m_start - m_end, ROUNDING))
        if BOUNDED:
            latest = tl.associative_scan(tl.where(start, place, -1), 0, larger)
            last = tl.max(latest, 0)
            read = tl.where(latest >= 0, 0.0, read)
            write = tl.where(place < last, 0.0, write)
            decay = tl.where(last >= 0, 0.0, decay)
            tl.store(first + row * chunks * L + t, latest)
        target = (sums - m_all + log_scale) * LOG2E
        target = tl.minimum(tl.maximum(target, -LARGE), LARGE)
        source = tl.minimum(tl.maximum((log_i - sums) * LOG2E, -LARGE), LARGE)
        rounded = target.to(tl.float32)
        tl.store(gates + TARGET * plane + t, rounded)
        tl.store(gates + TARGET_REST * plane + t, (target - rounded.to(tl.float64)).to(tl.float32))
        rounded = source.to(tl.float32)
        tl.store(gates + SOURCE * plane + t, rounded)
        tl.store(gates + SOURCE_REST * plane + t, (source - rounded.to(tl.float64)).to(tl.float32))
        tl.store(gates + READ * plane + t, read.to(tl.float32))
        tl.store(gates + WRITE * plane + t, write.to(tl.float32))
        tl.store(gates + STABILIZER * plane + t, m_all.to(tl.float32))
        tl.store(keep + row * chunks + chunk, decay.to(tl.float32))
    if first_chunk + chunks_per_program >= chunks:
        tl.store(last_m + row, m.to(tl.float32))


@triton.jit
def gate_gradients_kernel(
    igate, fgate, first, keep, parts, across, d_igate, d_fgate,
    stride_ib, stride_ih, stride_is, stride_fb, stride_fh, stride_fs,
    heads, s, chunks, x_tiles, across_parts, plane, cap,
    L: tl.constexpr, EXP_GATE: tl.constexpr, BOUNDED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Gate gradients of one chunk from what `query_key_gradients_kernel` left; grid rows * chunks.

    A forget gate at t decays the pairs (source before t, target at or after t). Pairs inside one
    tile were summed directly (CORNER); the others are sums over whole rows minus whole columns:
    the usual reversed cumulative sum, but free of the diagonal, which would cancel badly.
    """
    pid = tl.program_id(0)
    row = (pid // chunks).to(tl.int64)
    chunk = pid % chunks
    batch, head = row // heads, row % heads
    place = tl.arange(0, L)
    t = chunk * L + place
    at = row * chunks * L + t
    later = tl.zeros([L], tl.float64)
    earlier = tl.zeros([L], tl.float64)
    d_log_f = tl.zeros([L], tl.float64)
    d_log_i = tl.zeros([L], tl.float64)
    for tile in range(x_tiles):
        part = parts + tile * plane + at
        step = x_tiles * plane
        later += tl.load(part + ROW * step).to(tl.float64)
        later -= tl.load(part + COLUMN_PAIRS * step).to(tl.float64)
        earlier += tl.load(part + COLUMN_STATE * step).to(tl.float64)
        d_log_f += tl.load(part + CORNER * step).to(tl.float64)
        d_log_i += tl.load(part + INPUT * step).to(tl.float64)
    passed = tl.full([], 0.0, tl.float64)
    for tile in range(across_parts):
        passed += tl.load(across + (row * chunks + chunk) * across_parts + tile).to(tl.float64)
    passed *= tl.load(keep + row * chunks + chunk).to(tl.float64)
    d_log_f += tl.sum(later, 0) - tl.cumsum(later, 0) + later
    d_log_f += tl.cumsum(earlier, 0) - earlier + passed
    if BOUNDED:
        d_log_f = tl.where(tl.load(first + at) == place, 0.0, d_log_f)
    valid = t < s
    long = t.to(tl.int64)
    f = tl.load(
        fgate + batch * stride_fb + head * stride_fh + long * stride_fs, mask=valid, other=0.0
    ).to(tl.float64)
    if CAPPED:
        d_log_f *= cap_slope(f, cap)
        f = capped(f, cap)
    d_log_f *= 1.0 / (1.0 + tl.exp(tl.minimum(f, 700.0)))
    if CAPPED or not EXP_GATE:
        i = tl.load(
            igate + batch * stride_ib + head * stride_ih + long * stride_is, mask=valid, other=0.0
        ).to(tl.float64)
        if CAPPED:
            d_log_i *= cap_slope(i, cap)
            i = capped(i, cap)
        if not EXP_GATE:
            d_log_i *= 1.0 / (1.0 + tl.exp(tl.minimum(i, 700.0)))
    out = row * s + t
    tl.store(d_fgate + out, d_log_f.to(tl.float32).to(d_fgate.dtype.element_ty), mask=valid)
    tl.store(d_igate + out, d_log_i.to(tl.float32).to(d_igate.dtype.element_ty), mask=valid)
