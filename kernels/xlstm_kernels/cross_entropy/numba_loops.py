"""Sums over soft-capped logits and their gradient as compiled loops; used by `numba` only.

Arrays are flat. `logits` has rows of `width` numbers, `stride` apart; `width` is a multiple of the
vectors' length. A cap of 0 means none.
"""

import math

from xlstm_kernels.common.numba.compiled import compiled
from xlstm_kernels.common.numba.vectors import (
    LANES,
    exp,
    inlined,
    lane_max,
    lane_sum,
    load,
    splat,
    store,
    tanh,
    where_less,
)


@inlined
def capped_number(x, cap):
    """The soft cap of one number."""
    return math.tanh(x / cap) * cap if cap > 0.0 else x


@compiled
def statistics(first, end, width, stride, cap, shifts, logits, labels, largest, total, chosen):
    """Rows from `first` to before `end`; see `softmax_statistics`.

    Args:
        first: The first row.
        end: Behind the last row.
        width: Numbers in a row.
        stride: From row to row.
        cap: Of the logits.
        shifts: Whether the largest number is subtracted before the exponential.
        logits: Is read.
        labels: Int64 [rows].
        largest: Gets the shift of each row.
        total: Gets the sum of exponentials.
        chosen: Gets the label's number.
    """
    inverse = 1.0 / cap if cap > 0.0 else 0.0
    for row in range(first, end):
        x0 = row * stride
        top = 0.0
        if shifts:
            most = load(logits, x0)
            for j in range(LANES, width, LANES):
                x = load(logits, x0 + j)
                most = where_less(most, x, x, most)
            top = capped_number(float(lane_max(most)), cap)  # the cap keeps the order
        terms = splat(0.0)
        if cap > 0.0:
            for j in range(0, width, LANES):
                terms = terms + exp(tanh(load(logits, x0 + j) * inverse) * cap - top)
        else:
            for j in range(0, width, LANES):
                terms = terms + exp(load(logits, x0 + j) - top)
        largest[row], total[row], chosen[row] = top, lane_sum(terms), 0.0
        label = labels[row]
        if label >= 0 and label < width:
            chosen[row] = capped_number(float(logits[x0 + label]), cap)


@compiled
def gradient(first, end, width, stride, cap, labels, log_total, grad, logits):
    """Rows from `first` to before `end` of `logits` become their gradient; see `softmax_gradient`.

    Args:
        first: The first row.
        end: Behind the last row.
        width: Numbers in a row.
        stride: From row to row.
        cap: Of the logits.
        labels: Int64 [rows].
        log_total: [rows], the logsumexp over the whole vocabulary.
        grad: [rows], the gradient of each loss.
        logits: Is read and written.
    """
    inverse = 1.0 / cap if cap > 0.0 else 0.0
    for row in range(first, end):
        x0, shift, scale = row * stride, log_total[row], grad[row]
        label = labels[row]
        mine = label >= 0 and label < width
        slope = 1.0
        if mine and cap > 0.0:
            z = math.tanh(float(logits[x0 + label]) / cap)
            slope = 1.0 - z * z
        if cap > 0.0:
            for j in range(0, width, LANES):
                z = tanh(load(logits, x0 + j) * inverse)
                store(logits, x0 + j, exp(z * cap - shift) * scale * (1.0 - z * z))
        else:
            for j in range(0, width, LANES):
                store(logits, x0 + j, exp(load(logits, x0 + j) - shift) * scale)
        if mine:
            logits[x0 + label] -= slope * scale
