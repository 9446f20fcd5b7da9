"""The sLSTM's two loops over time for the CPU, compiled by Numba: no system compiler is needed.

One call works off tasks, a task being one head and up to four rows of the batch. Its recurrent
matrix stays in the cache over all steps, and each tile of its product with the four rows stays in
registers.

Buffers are flat float32 arrays; `width` is the head dimension rounded up to `TILE`, with zeros in
the padding of the weights. Gates are in the order i, f, z, o. Used by `scan` only.
"""

from xlstm_kernels.common.numba.compiled import compiled
from xlstm_kernels.common.numba.vectors import (
    LANES,
    TILE,
    exp,
    inlined,
    load,
    log1p_unit,
    magnitude,
    sigmoid,
    store,
    tanh,
    where_less,
)

ROWS = 4  # of the batch in one task


@inlined
def add_product(rows, x, x0, x_row, matrix, m0, inner, width, y, y0, y_row):
    """y[row] += x[row] @ matrix for up to ROWS rows.

    `matrix` [width / TILE, inner, TILE] at m0; rows of x and y are x_row and y_row apart; `inner`
    is even.
    """
    for j in range(0, width, TILE):
        o = y0 + j
        m = m0 + j * inner
        if rows == ROWS:
            a0, b0 = load(y, o), load(y, o + LANES)
            a1, b1 = load(y, o + y_row), load(y, o + y_row + LANES)
            a2, b2 = load(y, o + 2 * y_row), load(y, o + 2 * y_row + LANES)
            a3, b3 = load(y, o + 3 * y_row), load(y, o + 3 * y_row + LANES)
            for k in range(x0, x0 + inner):
                u, v = load(matrix, m), load(matrix, m + LANES)
                m += TILE
                s = x[k]
                a0, b0 = a0 + u * s, b0 + v * s
                s = x[k + x_row]
                a1, b1 = a1 + u * s, b1 + v * s
                s = x[k + 2 * x_row]
                a2, b2 = a2 + u * s, b2 + v * s
                s = x[k + 3 * x_row]
                a3, b3 = a3 + u * s, b3 + v * s
            store(y, o, a0)
            store(y, o + LANES, b0)
            store(y, o + y_row, a1)
            store(y, o + y_row + LANES, b1)
            store(y, o + 2 * y_row, a2)
            store(y, o + 2 * y_row + LANES, b2)
            store(y, o + 3 * y_row, a3)
            store(y, o + 3 * y_row + LANES, b3)
        else:
            for row in range(rows):
                o = y0 + row * y_row + j
                m = m0 + j * inner
                a0, b0 = load(y, o), load(y, o + LANES)
                a1, b1 = load(matrix, m) * 0.0, load(matrix, m) * 0.0  # y may hold -inf
                for k in range(x0 + row * x_row, x0 + row * x_row + inner, 2):
                    s, t = x[k], x[k + 1]
                    a0, b0 = a0 + load(matrix, m) * s, b0 + load(matrix, m + LANES) * s
                    m += TILE
                    a1, b1 = a1 + load(matrix, m) * t, b1 + load(matrix, m + LANES) * t
                    m += TILE
                store(y, o, a0 + a1)
                store(y, o + LANES, b0 + b1)


@inlined
def add(y, y0, x, x0, z, z0, d):
    """y = x + z, d numbers of each from y0, x0 and z0."""
    whole = d // LANES * LANES
    for j in range(0, whole, LANES):
        store(y, y0 + j, load(x, x0 + j) + load(z, z0 + j))
    for j in range(whole, d):
        y[y0 + j] = x[x0 + j] + z[z0 + j]


@inlined
def copy(y, y0, x, x0, d):
    """y = x, d numbers of each from y0 and x0."""
    whole = d // LANES * LANES
    for j in range(0, whole, LANES):
        store(y, y0 + j, load(x, x0 + j))
    for j in range(whole, d):
        y[y0 + j] = x[x0 + j]


@compiled
def forward(
    first_task, end_task, batch, steps, heads, d, width, slots, sigmoid_forget, lstm,
    preacts, bias, matrix, starts, sums, acts, decays, hs, cs, ns, ms, out,
):  # fmt: skip
    """All steps of the tasks from `first_task` to before `end_task`.

    preacts [batch, steps, 4, heads, d] and bias [4, heads, d] in; matrix [heads, 4 width / TILE,
    width, TILE] in; starts [batch, steps] uint8 in; sums [heads, batch, 4, width] is scratch.
    acts [heads, batch, steps, slots, width] gets write gate, d decay / d pre-activation, tanh(z),
    sigmoid(o), and, with 5 slots, d write / d pre-activation of a sigmoid input gate (with 4 the
    input gate is exponential, and the derivative is the gate itself); decays [heads, batch, steps,
    width]; hs, cs, ns [heads, batch, steps + 1, width]: states before each step and after the last,
    of which the first are given (h is zeroed where a document starts); ms [heads, batch, width] in
    and out. With `lstm` n is 1, and m is 0, or -inf where nothing is remembered. out [batch, steps,
    heads, d] gets h.
    """
    blocks = (batch + ROWS - 1) // ROWS
    for task in range(first_task, end_task):
        head, first = task // blocks, task % blocks * ROWS
        rows = min(ROWS, batch - first)
        index = head * batch + first
        for t in range(steps):
            acts0 = (index * steps + t) * slots * width
            states0 = (index * (steps + 1) + t) * width
            for row in range(rows):
                b = first + row
                x = (b * steps + t) * 4 * heads + head
                y = (index + row) * 4 * width
                for gate in range(4):
                    source, offset = (x + gate * heads) * d, (gate * heads + head) * d
                    add(sums, y + gate * width, preacts, source, bias, offset, d)
                    for j in range(d, width):
                        sums[y + gate * width + j] = 0.0
                if starts[b * steps + t]:
                    for j in range(0, width, LANES):
                        store(hs, states0 + row * (steps + 1) * width + j, 0.0)
                        store(ms, (index + row) * width + j, -float("inf"))
            add_product(
                rows, hs, states0, (steps + 1) * width,
                matrix, head * 4 * width * width, width, 4 * width,
                sums, index * 4 * width, 4 * width,
            )  # fmt: skip
            for row in range(rows):
                y = (index + row) * 4 * width
                a, now = acts0 + row * steps * slots * width, states0 + row * (steps + 1) * width
                for j in range(0, width, LANES):
                    i, f = load(sums, y + j), load(sums, y + width + j)
                    z, o = load(sums, y + 2 * width + j), load(sums, y + 3 * width + j)
                    m = load(ms, (index + row) * width + j)
                    if lstm:
                        write, decay = sigmoid(i), where_less(m, 0.0, 0.0, sigmoid(f))
                        z, o = tanh(z), sigmoid(o)
                        c = decay * load(cs, now + j) + write * z
                        store(acts, a + j, write)
                        store(acts, a + width + j, decay * sigmoid(0.0 - f))
                        store(acts, a + 2 * width + j, z)
                        store(acts, a + 3 * width + j, o)
                        store(acts, a + 4 * width + j, write * sigmoid(0.0 - i))
                        store(decays, ((index + row) * steps + t) * width + j, decay)
                        store(ms, (index + row) * width + j, 0.0)
                        store(cs, now + width + j, c)
                        store(ns, now + width + j, 1.0)
                        store(hs, now + width + j, o * tanh(c))
                        continue
                    if slots == 5:
                        e = exp(0.0 - magnitude(i))
                        i = where_less(i, 0.0, i, 0.0) - log1p_unit(e)  # log of the gate
                    if sigmoid_forget:
                        e = exp(0.0 - magnitude(f))
                        carried = where_less(f, 0.0, f, 0.0) - log1p_unit(e) + m
                        large = 1.0 / (e + 1.0)
                        closing = where_less(f, 0.0, large, e * large)  # sigmoid(-f)
                    else:
                        carried = f + m
                        closing = where_less(f, f, f, 1.0)
                    # Both exponentials: with one of the difference a broken gate would not show.
                    m = where_less(carried, i, i, carried)
                    write, decay = exp(i - m), exp(carried - m)
                    store(ms, (index + row) * width + j, m)
                    z, o = tanh(z), sigmoid(o)
                    c = decay * load(cs, now + j) + write * z
                    n = decay * load(ns, now + j) + write
                    store(acts, a + j, write)
                    store(acts, a + width + j, decay * closing)
                    store(acts, a + 2 * width + j, z)
                    store(acts, a + 3 * width + j, o)
                    if slots == 5:
                        store(acts, a + 4 * width + j, write * sigmoid(0.0 - load(sums, y + j)))
                    store(decays, ((index + row) * steps + t) * width + j, decay)
                    store(cs, now + width + j, c)
                    store(ns, now + width + j, n)
                    store(hs, now + width + j, o * c / n)
                copy(out, (((first + row) * steps + t) * heads + head) * d, hs, now + width, d)


@compiled
def backward(
    first_task, end_task, batch, steps, heads, d, width, slots, lstm,
    d_out, matrix, starts, acts, decays, cs, ns, d_h, d_c, d_n, d_step, d_preacts,
):  # fmt: skip
    """All steps of the tasks from `first_task` to before `end_task`, backwards.

    d_out [batch, steps, heads, d] in; matrix [heads, width / TILE, 4 width, TILE] in, the
    transposed one; d_h, d_c, d_n [heads, batch, width] in and out: gradients of the last state,
    then of the first. d_step [heads, batch, 4, width] is scratch; d_preacts [batch, steps, 4,
    heads, d] out. The others are those of `forward`.
    """
    blocks = (batch + ROWS - 1) // ROWS
    for task in range(first_task, end_task):
        head, first = task // blocks, task % blocks * ROWS
        rows = min(ROWS, batch - first)
        index = head * batch + first
        for t in range(steps - 1, -1, -1):
            for row in range(rows):
                b, at = first + row, index + row
                add(
                    d_h, at * width, d_h, at * width, d_out, ((b * steps + t) * heads + head) * d, d
                )
                a, now = (at * steps + t) * slots * width, (at * (steps + 1) + t) * width
                g = at * 4 * width
                for j in range(0, width, LANES):
                    write, closing = load(acts, a + j), load(acts, a + width + j)
                    z, o = load(acts, a + 2 * width + j), load(acts, a + 3 * width + j)
                    decay = load(decays, (at * steps + t) * width + j)
                    dh = load(d_h, at * width + j)
                    c, inverse = load(cs, now + width + j), 1.0 / load(ns, now + width + j)
                    if lstm:
                        squashed = tanh(c)
                        h = o * squashed
                        dc = load(d_c, at * width + j) + dh * o * (1.0 - squashed * squashed)
                        dn = 0.0 * h
                    else:
                        h = o * c * inverse
                        dc = load(d_c, at * width + j) + dh * o * inverse
                        dn = load(d_n, at * width + j) - dh * h * inverse
                    slope = write if slots == 4 else load(acts, a + 4 * width + j)
                    store(d_step, g + j, slope * (dc * z + dn))
                    d_f = closing * (dc * load(cs, now + j) + dn * load(ns, now + j))
                    store(d_step, g + width + j, d_f)
                    store(d_step, g + 2 * width + j, dc * write * (1.0 - z * z))
                    store(d_step, g + 3 * width + j, dh * h * (1.0 - o))
                    store(d_c, at * width + j, dc * decay)
                    store(d_n, at * width + j, dn * decay)
                    store(d_h, at * width + j, 0.0)
                x0 = (b * steps + t) * 4 * heads + head
                for gate in range(4):
                    copy(d_preacts, (x0 + gate * heads) * d, d_step, g + gate * width, d)
            add_product(
                rows, d_step, index * 4 * width, 4 * width,
                matrix, head * 4 * width * width, 4 * width, width,
                d_h, index * width, width,
            )  # fmt: skip
            for row in range(rows):
                if starts[(first + row) * steps + t]:
                    for j in range(0, width, LANES):
                        store(d_h, (index + row) * width + j, 0.0)
