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

# Vary without recompilation; heads and d belong to a model, and loads are wide where 16 divides d.
SIZES = ["batch", "steps"]
SIZES_AND_RANGE = [*SIZES, "first", "last"]


@triton.jit
def gate_factors(i, f, m, SIGMOID: tl.constexpr):
    """write, decay, d decay / d f, and m after a step, without overflow; m may be -inf."""
    if SIGMOID:
        e = tl.exp(-tl.abs(f))
        # log(1 + e) keeps no digits of a small e, and its error adds up in m over the steps
        series = e * (1.0 - e * (0.5 - e * (1.0 / 3 - e * (0.25 - e * 0.2))))
        carried = tl.minimum(f, 0.0) - tl.where(e < 0.03, series, tl.log(1.0 + e)) + m
        closing = tl.where(f < 0.0, 1.0, e) / (1.0 + e)
    else:
        carried = f + m
        closing = tl.full(f.shape, 1.0, tl.float32)
    smaller = tl.exp(-tl.abs(carried - i))  # one of the two gates is 1: m is the larger exponent
    write = tl.where(i < carried, smaller, 1.0)
    decay = tl.where(carried < i, smaller, 1.0)
    return write, decay, decay * closing, tl.maximum(carried, i)


@triton.jit
def tanh(x):
    """Tanh with full relative precision: a power series where exp would cancel."""
    x2 = x * x
    series = x * (1.0 - x2 * (1.0 / 3 - x2 * (2.0 / 15 - x2 * (17.0 / 315))))
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x2 < 0.01, series, tl.where(x < 0.0, -y, y))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def cell(i, f, z, o, c, n, m, SIGMOID: tl.constexpr):
    """One step from pre-activations: h, c, n, m, and what the backward pass keeps."""
    write, decay, closing, m = gate_factors(i, f, m, SIGMOID)
    z = tanh(z)
    o = sigmoid(o)
    c = decay * c + write * z
    n = decay * n + write
    return o * c / n, c, n, m, write, closing, z, o, decay


@triton.jit
def cell_gradient(d_h, d_c, d_n, write, closing, z, o, decay, c, n):
    """Gradients of the pre-activations i, f, z, o and of c, n before the step, which are given."""
    inverse = 1.0 / (decay * n + write)
    h = o * (decay * c + write * z) * inverse
    d_c += d_h * o * inverse
    d_n -= d_h * h * inverse
    d_i = write * (d_c * z + d_n)
    d_f = closing * (d_c * c + d_n * n)
    d_z = d_c * write * (1.0 - z * z)
    d_o = d_h * h * (1.0 - o)
    return d_i, d_f, d_z, d_o, d_c * decay, d_n * decay


@triton.jit
def load_wide(pointer, mask):
    """Masked load as float32, zeros elsewhere."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b, summed in float32."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def forward_resident(
    preacts, weight, bias, starts, h_state, c_state, n_state, m_state, out, acts, decays, cs, ns,
    batch, steps, heads, d,
    SIGMOID: tl.constexpr, PRECISION: tl.constexpr, BATCH: tl.constexpr, D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """All steps of one head and BATCH rows. States in and out; cs, ns before each step."""
    pid = tl.program_id(0).to(tl.int64)
    head, row = pid % heads, pid // heads * BATCH + tl.arange(0, BATCH)
    column, inner = tl.arange(0, D), tl.arange(0, D)
    inside = column < d
    mask = (row < batch)[:, None] & inside[None, :]
    width = heads * d  # of one gate of one token
    gate = heads * d * d
    tile = weight + head * d * d + inner[:, None] * d + column[None, :]
    square = (inner < d)[:, None] & inside[None, :]
    R_i = tl.load(tile, mask=square, other=0.0)
    R_f = tl.load(tile + gate, mask=square, other=0.0)
    R_z = tl.load(tile + 2 * gate, mask=square, other=0.0)
    R_o = tl.load(tile + 3 * gate, mask=square, other=0.0)
    position = head * d + column
    b_i = load_wide(bias + position, inside)[None, :]
    b_f = load_wide(bias + width + position, inside)[None, :]
    b_z = load_wide(bias + 2 * width + position, inside)[None, :]
    b_o = load_wide(bias + 3 * width + position, inside)[None, :]
    state = row[:, None] * width + position[None, :]
    h = load_wide(h_state + state, mask)
    c, n = load_wide(c_state + state, mask), load_wide(n_state + state, mask)
    m = load_wide(m_state + state, mask)
    for t in tl.range(0, steps, num_stages=STAGES):
        token = row * steps + t
        at = token[:, None] * width + position[None, :]
        at4 = token[:, None] * (4 * width) + position[None, :]
        x_i = load_wide(preacts + at4, mask)
        x_f = load_wide(preacts + at4 + width, mask)
        x_z = load_wide(preacts + at4 + 2 * width, mask)
        x_o = load_wide(preacts + at4 + 3 * width, mask)
        if starts is not None:
            start = (tl.load(starts + token, mask=row < batch, other=0) != 0)[:, None]
            h = tl.where(start, 0.0, h)
            m = tl.where(start, -float("inf"), m)
        left = h.to(weight.dtype.element_ty)
        i = product(left, R_i, PRECISION) + (x_i + b_i)
        f = product(left, R_f, PRECISION) + (x_f + b_f)
        z = product(left, R_z, PRECISION) + (x_z + b_z)
        o = product(left, R_o, PRECISION) + (x_o + b_o)
        tl.store(cs + at, c, mask=mask)
        tl.store(ns + at, n, mask=mask)
        h, c, n, m, write, closing, z, o, decay = cell(i, f, z, o, c, n, m, SIGMOID)
        tl.store(out + at, h.to(out.dtype.element_ty), mask=mask)
        tl.store(acts + at4, write.to(acts.dtype.element_ty), mask=mask)
        tl.store(acts + at4 + width, closing.to(acts.dtype.element_ty), mask=mask)
        tl.store(acts + at4 + 2 * width, z.to(acts.dtype.element_ty), mask=mask)
        tl.store(acts + at4 + 3 * width, o.to(acts.dtype.element_ty), mask=mask)
        tl.store(decays + at, decay, mask=mask)
    tl.store(h_state + state, h, mask=mask)
    tl.store(c_state + state, c, mask=mask)
    tl.store(n_state + state, n, mask=mask)
    tl.store(m_state + state, m, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def backward_resident(
    d_out, weight, starts, acts, decays, cs, ns, d_h_state, d_c_state, d_n_state, d_preacts,
    batch, steps, heads, d,
    PRECISION: tl.constexpr, BATCH: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All steps of one head and BATCH rows, backwards. State gradients: last to first."""
    pid = tl.program_id(0).to(tl.int64)
    head, row = pid % heads, pid // heads * BATCH + tl.arange(0, BATCH)
    column, inner = tl.arange(0, D), tl.arange(0, D)
    inside = column < d
    mask = (row < batch)[:, None] & inside[None, :]
    width = heads * d
    gate = heads * d * d
    tile = weight + head * d * d + inner[:, None] + column[None, :] * d  # transposed
    square = (inner < d)[:, None] & inside[None, :]
    R_i = tl.load(tile, mask=square, other=0.0)
    R_f = tl.load(tile + gate, mask=square, other=0.0)
    R_z = tl.load(tile + 2 * gate, mask=square, other=0.0)
    R_o = tl.load(tile + 3 * gate, mask=square, other=0.0)
    position = head * d + column
    state = row[:, None] * width + position[None, :]
    d_h = load_wide(d_h_state + state, mask)
    d_c, d_n = load_wide(d_c_state + state, mask), load_wide(d_n_state + state, mask)
    for step in tl.range(0, steps, num_stages=STAGES):
        token = row * steps + (steps - 1 - step)
        at = token[:, None] * width + position[None, :]
        at4 = token[:, None] * (4 * width) + position[None, :]
        d_h += load_wide(d_out + at, mask)
        write, closing = load_wide(acts + at4, mask), load_wide(acts + at4 + width, mask)
        z, o = load_wide(acts + at4 + 2 * width, mask), load_wide(acts + at4 + 3 * width, mask)
        decay = tl.load(decays + at, mask=mask, other=1.0)
        c = load_wide(cs + at, mask)
        n = tl.load(ns + at, mask=mask, other=1.0)
        d_i, d_f, d_z, d_o, d_c, d_n = cell_gradient(
            d_h, d_c, d_n, write, closing, z, o, decay, c, n
        )
        g_i, g_f = d_i.to(weight.dtype.element_ty), d_f.to(weight.dtype.element_ty)
        g_z, g_o = d_z.to(weight.dtype.element_ty), d_o.to(weight.dtype.element_ty)
        tl.store(d_preacts + at4, g_i, mask=mask)
        tl.store(d_preacts + at4 + width, g_f, mask=mask)
        tl.store(d_preacts + at4 + 2 * width, g_z, mask=mask)
        tl.store(d_preacts + at4 + 3 * width, g_o, mask=mask)
        d_h = product(g_i, R_i, PRECISION) + product(g_f, R_f, PRECISION)
        d_h += product(g_z, R_z, PRECISION) + product(g_o, R_o, PRECISION)
        if starts is not None:
            start = tl.load(starts + token, mask=row < batch, other=0) != 0
            d_h = tl.where(start[:, None], 0.0, d_h)
    tl.store(d_h_state + state, d_h, mask=mask)
    tl.store(d_c_state + state, d_c, mask=mask)
    tl.store(d_n_state + state, d_n, mask=mask)


@triton.jit
def recurrent_sums(
    h, weight, known, row, column, inside, head, width, gate, d,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BATCH: tl.constexpr, WIDTH: tl.constexpr,
    INNER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h @ R of the four gates at `column`, [BATCH, WIDTH] each; rows not `known` count as zeros.

    Products of OPERANDs, summed in float32.
    """
    i = tl.zeros([BATCH, WIDTH], tl.float32)
    f = tl.zeros([BATCH, WIDTH], tl.float32)
    z = tl.zeros([BATCH, WIDTH], tl.float32)
    o = tl.zeros([BATCH, WIDTH], tl.float32)
    for k in tl.range(0, d, INNER, num_stages=STAGES):
        inner = k + tl.arange(0, INNER)
        left = load_wide(
            h + head * d + row[:, None] * width + inner[None, :],
            known[:, None] & (inner < d)[None, :],
        ).to(OPERAND)
        right = weight + head * d * d + inner[:, None] * d + column[None, :]
        piece = (inner < d)[:, None] & inside[None, :]
        i += product(left, tl.load(right, mask=piece, other=0.0).to(OPERAND), PRECISION)
        f += product(left, tl.load(right + gate, mask=piece, other=0.0).to(OPERAND), PRECISION)
        z += product(left, tl.load(right + 2 * gate, mask=piece, other=0.0).to(OPERAND), PRECISION)
        o += product(left, tl.load(right + 3 * gate, mask=piece, other=0.0).to(OPERAND), PRECISION)
    return i, f, z, o


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
    pid = tl.program_id(0).to(tl.int64)
    head, block, tile, tiles = pid % heads, pid // heads, 0, tl.cdiv(d, WIDTH)
    if APART:
        tile, block = (block % tiles).to(tl.int32), block // tiles
        tiles = tile + 1
    row = block * BATCH + tl.arange(0, BATCH)
    width = heads * d
    gate = heads * d * d
    part = tl.cast(batch, tl.int64) * width
    for t in range(first, last):
        token = row * steps + t
        alive = row < batch
        if starts is not None:
            alive = alive & (tl.load(starts + token, mask=alive, other=0) == 0)
        h_prev = h_states + (t % 2) * part
        for j in range(tile, tiles):
            column = j * WIDTH + tl.arange(0, WIDTH)
            inside = column < d
            i, f, z, o = recurrent_sums(
                h_prev, weight, alive, row, column, inside, head, width, gate, d,
                preacts.dtype.element_ty, PRECISION, BATCH, WIDTH, INNER, STAGES,
            )  # fmt: skip
            mask = (row < batch)[:, None] & inside[None, :]
            position = head * d + column
            at4 = token[:, None] * (4 * width) + position[None, :]
            i += load_wide(preacts + at4, mask) + load_wide(bias + position, inside)[None, :]
            position += width
            f += load_wide(preacts + at4 + width, mask)
            f += load_wide(bias + position, inside)[None, :]
            position += width
            z += load_wide(preacts + at4 + 2 * width, mask)
            z += load_wide(bias + position, inside)[None, :]
            position += width
            o += load_wide(preacts + at4 + 3 * width, mask)
            o += load_wide(bias + position, inside)[None, :]
            position = head * d + column
            state = row[:, None] * width + position[None, :]
            at = token[:, None] * width + position[None, :]
            m = tl.load(m_state + state, mask=mask, other=0.0)
            if starts is not None:
                m = tl.where(alive[:, None], m, -float("inf"))
            c, n = load_wide(c_state + state, mask), load_wide(n_state + state, mask)
            tl.store(cs + at, c, mask=mask)
            tl.store(ns + at, n, mask=mask)
            h, c, n, m, write, closing, z, o, decay = cell(i, f, z, o, c, n, m, SIGMOID)
            tl.store(m_state + state, m, mask=mask)
            tl.store(c_state + state, c, mask=mask)
            tl.store(n_state + state, n, mask=mask)
            tl.store(h_states + ((t + 1) % 2) * part + state, h, mask=mask)
            tl.store(out + at, h.to(out.dtype.element_ty), mask=mask)
            tl.store(acts + at4, write.to(acts.dtype.element_ty), mask=mask)
            tl.store(acts + at4 + width, closing.to(acts.dtype.element_ty), mask=mask)
            tl.store(acts + at4 + 2 * width, z.to(acts.dtype.element_ty), mask=mask)
            tl.store(acts + at4 + 3 * width, o.to(acts.dtype.element_ty), mask=mask)
            tl.store(decays + at, decay, mask=mask)
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
    pid = tl.program_id(0).to(tl.int64)
    head, block, tile, tiles = pid % heads, pid // heads, 0, tl.cdiv(d, WIDTH)
    if APART:
        tile, block = (block % tiles).to(tl.int32), block // tiles
        tiles = tile + 1
    row = block * BATCH + tl.arange(0, BATCH)
    width = heads * d
    gate = heads * d * d
    R = weight + head * d * d
    for step in range(first, last):
        t = steps - 1 - step
        after = row * steps + (t + 1)
        alive = (row < batch) & (step > 0)
        if starts is not None:
            alive = alive & (tl.load(starts + after, mask=alive, other=0) == 0)
        for j in range(tile, tiles):
            column = j * WIDTH + tl.arange(0, WIDTH)
            inside = column < d
            e_i = tl.zeros([BATCH, WIDTH], tl.float32)
            e_f = tl.zeros([BATCH, WIDTH], tl.float32)
            e_z = tl.zeros([BATCH, WIDTH], tl.float32)
            e_o = tl.zeros([BATCH, WIDTH], tl.float32)
            for k in tl.range(0, d, INNER, num_stages=STAGES):
                inner = k + tl.arange(0, INNER)
                left = d_preacts + after[:, None] * (4 * width) + head * d + inner[None, :]
                known = alive[:, None] & (inner < d)[None, :]
                right = R + inner[:, None] + column[None, :] * d  # transposed
                piece = (inner < d)[:, None] & inside[None, :]
                e_i += product(
                    tl.load(left, mask=known, other=0.0),
                    tl.load(right, mask=piece, other=0.0),
                    PRECISION,
                )
                e_f += product(
                    tl.load(left + width, mask=known, other=0.0),
                    tl.load(right + gate, mask=piece, other=0.0),
                    PRECISION,
                )
                e_z += product(
                    tl.load(left + 2 * width, mask=known, other=0.0),
                    tl.load(right + 2 * gate, mask=piece, other=0.0),
                    PRECISION,
                )
                e_o += product(
                    tl.load(left + 3 * width, mask=known, other=0.0),
                    tl.load(right + 3 * gate, mask=piece, other=0.0),
                    PRECISION,
                )
            mask = (row < batch)[:, None] & inside[None, :]
            position = head * d + column
            state = row[:, None] * width + position[None, :]
            d_h = (e_i + e_f) + (e_z + e_o) + load_wide(d_h_last + state, mask & (step == 0))
            if t < 0:
                tl.store(d_h_first + state, d_h, mask=mask)
            else:
                token = row * steps + t
                at = token[:, None] * width + position[None, :]
                at4 = token[:, None] * (4 * width) + position[None, :]
                d_h += load_wide(d_out + at, mask)
                d_c, d_n = load_wide(d_c_state + state, mask), load_wide(d_n_state + state, mask)
                write, closing = load_wide(acts + at4, mask), load_wide(acts + at4 + width, mask)
                z = load_wide(acts + at4 + 2 * width, mask)
                o = load_wide(acts + at4 + 3 * width, mask)
                decay = tl.load(decays + at, mask=mask, other=1.0)
                c = load_wide(cs + at, mask)
                n = tl.load(ns + at, mask=mask, other=1.0)
                d_i, d_f, d_z, d_o, d_c, d_n = cell_gradient(
                    d_h, d_c, d_n, write, closing, z, o, decay, c, n
                )
                tl.store(d_preacts + at4, d_i.to(d_preacts.dtype.element_ty), mask=mask)
                tl.store(d_preacts + at4 + width, d_f.to(d_preacts.dtype.element_ty), mask=mask)
                tl.store(d_preacts + at4 + 2 * width, d_z.to(d_preacts.dtype.element_ty), mask=mask)
                tl.store(d_preacts + at4 + 3 * width, d_o.to(d_preacts.dtype.element_ty), mask=mask)
                tl.store(d_c_state + state, d_c, mask=mask)
                tl.store(d_n_state + state, d_n, mask=mask)
        tl.debug_barrier()  # the next step reads what other threads have stored
