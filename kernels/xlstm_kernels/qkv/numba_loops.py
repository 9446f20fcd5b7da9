"""q, k, v and gates of the classic mLSTM, and their gradients, as compiled loops.

Arrays are flat; used by `numba` only. The inputs are [b, s, inner] with strides (batch, time), and
columns side by side; q, k, v are [b, heads, s, d] and gates [b, s, gates], all contiguous. d is a
multiple of the vectors' length. Four tokens go through together, so that each weight is read once
for all of them; a tuple has their four vectors.

Blocks of 4 x 4 multiply vectors of whole blocks: with a vector turned by r = 0 to 3 numbers within
each four, `y = sum over r of diagonal[r] * turned[r]`. The diagonals [3, 4, inner] are those of q,
k and v. `w` is where the first diagonal of a map begins.
"""

from xlstm_kernels.common.numba.compiled import compiled
from xlstm_kernels.common.numba.vectors import LANES, inlined, lane_sum, load, splat, store, turn


@inlined
def load_four(x, at, step):
    """The vectors of four tokens, which lie `step` numbers apart."""
    return (load(x, at), load(x, at + step), load(x, at + 2 * step), load(x, at + 3 * step))


@inlined
def store_four(y, at, step, x):
    """Write the vectors of four tokens, `step` numbers apart."""
    store(y, at, x[0])
    store(y, at + step, x[1])
    store(y, at + 2 * step, x[2])
    store(y, at + 3 * step, x[3])


@inlined
def add_product(sums, x, factor):
    """`sums` of four tokens, plus their vectors times one factor."""
    return (
        sums[0] + x[0] * factor,
        sums[1] + x[1] * factor,
        sums[2] + x[2] * factor,
        sums[3] + x[3] * factor,
    )


@inlined
def turn_four(x):
    """The vectors of four tokens, turned by one."""
    return (turn(x[0]), turn(x[1]), turn(x[2]), turn(x[3]))


@inlined
def add_map(sums, x, diagonals, w, inner):
    """`sums` of four tokens, plus their vectors times the blocks."""
    for r in range(4):
        sums = add_product(sums, x, load(diagonals, w + r * inner))
        x = turn_four(x)
    return sums


@inlined
def add_gate(sums, y, at, steps, heads, d, weight, w):
    """`sums` of four tokens, plus what q, k or v [b, heads, s, d] adds to a gate, by lanes."""
    for head in range(heads):
        for j in range(0, d, LANES):
            four = load_four(y, at + head * steps * d + j, d)
            sums = add_product(sums, four, load(weight, w + head * d + j))
    return sums


@compiled
def forward(
    first, end, steps, heads, d, gates, c_strides, x_strides,
    convolved, x, diagonals, gate_weight, q, k, v, preacts,
):  # fmt: skip
    """The groups of four tokens from `first` to before `end`; see `qkv_and_gates`."""
    inner = heads * d
    zeros = (splat(0.0), splat(0.0), splat(0.0), splat(0.0))
    for group in range(first, end):
        b, t = group * 4 // steps, group * 4 % steps
        c0, x0 = b * c_strides[0] + t * c_strides[1], b * x_strides[0] + t * x_strides[1]
        y0 = (b * heads * steps + t) * d
        for head in range(heads):
            for j in range(0, d, LANES):
                c, at = head * d + j, y0 + head * steps * d + j
                source = load_four(convolved, c0 + c, c_strides[1])
                store_four(q, at, d, add_map(zeros, source, diagonals, c, inner))
                store_four(k, at, d, add_map(zeros, source, diagonals, 4 * inner + c, inner))
                source = load_four(x, x0 + c, x_strides[1])
                store_four(v, at, d, add_map(zeros, source, diagonals, 8 * inner + c, inner))
        for gate in range(gates):
            w = gate * 3 * inner
            sums = add_gate(zeros, q, y0, steps, heads, d, gate_weight, w)
            sums = add_gate(sums, k, y0, steps, heads, d, gate_weight, w + inner)
            sums = add_gate(sums, v, y0, steps, heads, d, gate_weight, w + 2 * inner)
            at = group * 4 * gates + gate
            preacts[at] = lane_sum(sums[0])
            preacts[at + gates] = lane_sum(sums[1])
            preacts[at + 2 * gates] = lane_sum(sums[2])
            preacts[at + 3 * gates] = lane_sum(sums[3])


@inlined
def total(one, other):
    """The sum of four tokens' products, a vector."""
    return one[0] * other[0] + one[1] * other[1] + one[2] * other[2] + one[3] * other[3]


@inlined
def through_gates(grad, y, d_preacts, p, gates, weight, d_weight, part, w, row):
    """The gradient of y, four tokens of q, k or v, with that of the gates; adds to d_weight."""
    for gate in range(gates):
        own, at = load(weight, w + gate * row), part + w + gate * row
        d = (
            splat(d_preacts[p + gate]),
            splat(d_preacts[p + gates + gate]),
            splat(d_preacts[p + 2 * gates + gate]),
            splat(d_preacts[p + 3 * gates + gate]),
        )
        grad = add_product(grad, d, own)
        store(d_weight, at, load(d_weight, at) + total(d, y))
    return grad


@inlined
def add_diagonals(d_diagonals, w, inner, grad, x):
    """Adds the gradient of the blocks that made four tokens of x into what `grad` belongs to."""
    for r in range(4):
        at = w + r * inner
        store(d_diagonals, at, load(d_diagonals, at) + total(grad, x))
        x = turn_four(x)


@compiled
def backward(
    first, end, parts, batch, steps, heads, d, gates, c_strides, x_strides, dc_strides, dx_strides,
    d_q, d_k, d_v, d_preacts, convolved, x, diagonals, gate_weight, q, k, v,
    d_convolved, d_x, d_diagonals, d_gate_weight,
):  # fmt: skip
    """Gradients of the groups in the parts from `first` to before `end`, of `parts` in all.

    Each part has a sum of its own in d_diagonals [parts, 3, 4, inner] and in d_gate_weight [parts,
    gates, 3, inner], so that the result does not depend on the number of threads. `diagonals` are
    those of the transposed blocks.
    """
    inner, groups = heads * d, batch * steps // 4
    row = 3 * inner
    zeros = (splat(0.0), splat(0.0), splat(0.0), splat(0.0))
    for part in range(first, end):
        blocks0, gates0 = part * 12 * inner, part * gates * row
        d_diagonals[blocks0 : blocks0 + 12 * inner] = 0.0
        d_gate_weight[gates0 : gates0 + gates * row] = 0.0
        for group in range(groups * part // parts, groups * (part + 1) // parts):
            b, t = group * 4 // steps, group * 4 % steps
            c0, x0 = b * c_strides[0] + t * c_strides[1], b * x_strides[0] + t * x_strides[1]
            dc0, dx0 = b * dc_strides[0] + t * dc_strides[1], b * dx_strides[0] + t * dx_strides[1]
            p = group * 4 * gates
            for head in range(heads):
                for j in range(0, d, LANES):
                    c, at = head * d + j, ((b * heads + head) * steps + t) * d + j
                    source = load_four(convolved, c0 + c, c_strides[1])
                    grad = through_gates(
                        load_four(d_q, at, d), load_four(q, at, d),
                        d_preacts, p, gates, gate_weight, d_gate_weight, gates0, c, row,
                    )  # fmt: skip
                    add_diagonals(d_diagonals, blocks0 + c, inner, grad, source)
                    d_source = add_map(zeros, grad, diagonals, c, inner)
                    grad = through_gates(
                        load_four(d_k, at, d), load_four(k, at, d),
                        d_preacts, p, gates, gate_weight, d_gate_weight, gates0, inner + c, row,
                    )  # fmt: skip
                    add_diagonals(d_diagonals, blocks0 + 4 * inner + c, inner, grad, source)
                    d_source = add_map(d_source, grad, diagonals, 4 * inner + c, inner)
                    store_four(d_convolved, dc0 + c, dc_strides[1], d_source)
                    source = load_four(x, x0 + c, x_strides[1])
                    grad = through_gates(
                        load_four(d_v, at, d), load_four(v, at, d),
                        d_preacts, p, gates, gate_weight, d_gate_weight, gates0, 2 * inner + c, row,
                    )  # fmt: skip
                    add_diagonals(d_diagonals, blocks0 + 8 * inner + c, inner, grad, source)
                    d_source = add_map(zeros, grad, diagonals, 8 * inner + c, inner)
                    store_four(d_x, dx0 + c, dx_strides[1], d_source)
