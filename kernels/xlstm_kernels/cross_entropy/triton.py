"""Sums over soft-capped logits on Triton, and their gradient: each reads the logits once.

A program of the first kernel has one row and goes over it in tiles, with a running maximum. The
second writes the gradient where the logits were, tile by tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_kernels.common.triton_launch import Launch, run_all, unsupported_reason

__all__ = ["gradient_triton", "statistics_triton", "unsupported_reason"]

COLUMNS = 4096  # of a tile
SIZES = ["width", "tiles"]  # vary without recompilation


@triton.jit
def soft_capped(b_x, cap, CAPPED: tl.constexpr):
    """cap * tanh(x / cap) of a float32 tile, exact where exp would cancel."""
    if not CAPPED:
        return b_x
    b_z = b_x / cap
    b_z2 = b_z * b_z
    b_series = b_z * (1.0 - b_z2 * (1.0 / 3 - b_z2 * (2.0 / 15 - b_z2 * (17.0 / 315))))
    b_e = tl.exp(-2.0 * tl.abs(b_z))
    b_t = (1.0 - b_e) / (1.0 + b_e)
    b_t = tl.where(b_z2 < 0.01, b_series, tl.where(b_z < 0.0, -b_t, b_t))
    return cap * b_t


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    logits, labels, largest, total, chosen, stride, width, cap,
    CAPPED: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """One row; grid rows. `stride` is that of the rows of logits."""
    i_row = tl.program_id(0).to(tl.int64)
    logits += i_row * stride
    # [BW]
    o_w = tl.arange(0, BW)
    b_largest = tl.full([BW], -float("inf"), tl.float32)
    b_total = tl.zeros([BW], tl.float32)
    for start in range(0, width, BW):
        m_w = start + o_w < width
        b_x = tl.load(logits + start + o_w, mask=m_w, other=0.0).to(tl.float32)
        b_y = tl.where(m_w, soft_capped(b_x, cap, CAPPED), -float("inf"))
        b_new = tl.maximum(b_largest, b_y)
        b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)  # nothing was there yet
        b_total = b_total * tl.exp(b_largest - b_safe) + tl.exp(b_y - b_safe)
        b_largest = b_new
    top = tl.max(b_largest, 0)
    tl.store(largest + i_row, top)
    tl.store(total + i_row, tl.sum(b_total * tl.exp(b_largest - top), 0))
    label = tl.load(labels + i_row)
    mine = (label >= 0) & (label < width)
    x = tl.load(logits + tl.where(mine, label, 0)).to(tl.float32)
    tl.store(chosen + i_row, tl.where(mine, soft_capped(x, cap, CAPPED), 0.0))


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    logits, labels, log_total, grad, stride, width, tiles, cap, inverse,
    CAPPED: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """A tile of one row, in place; grid rows * tiles. `inverse` is 1 / cap."""
    i_program = tl.program_id(0)
    i_row = (i_program // tiles).to(tl.int64)
    # [BW]
    o_w = i_program % tiles * BW + tl.arange(0, BW)
    m_w = o_w < width
    p_x = logits + i_row * stride + o_w
    b_x = tl.load(p_x, mask=m_w, other=0.0).to(tl.float32)
    b_y = soft_capped(b_x, cap, CAPPED)
    b_d = tl.exp(b_y - tl.load(log_total + i_row))
    b_d = tl.where(o_w == tl.load(labels + i_row), b_d - 1.0, b_d) * tl.load(grad + i_row)
    if CAPPED:
        b_z = b_y * inverse
        b_d *= 1.0 - b_z * b_z
    tl.store(p_x, b_d.to(logits.dtype.element_ty), mask=m_w)


def _tile(width: int) -> int:
    return min(triton.next_power_of_2(width), COLUMNS)


def plan_statistics(
    logits: Tensor, labels: Tensor, out: tuple[Tensor, Tensor, Tensor], cap: float | None
) -> Launch:
    """The launch of `softmax_statistics`; logits have unit stride last."""
    largest, total, chosen = out
    arguments = {"logits": logits, "labels": labels, "largest": largest, "total": total}
    arguments |= {"chosen": chosen, "stride": logits.stride(0), "width": logits.shape[1]}
    arguments |= {"cap": cap or 0.0, "CAPPED": cap is not None, "BW": _tile(logits.shape[1])}
    return Launch("softmax statistics", statistics_kernel, (len(logits),), arguments, 8, 1)


def plan_gradient(
    logits: Tensor, labels: Tensor, log_total: Tensor, grad: Tensor, cap: float | None
) -> Launch:
    """The launch of `softmax_gradient`; logits have unit stride last."""
    rows, width = logits.shape
    tiles = triton.cdiv(width, _tile(width))
    arguments = {"logits": logits, "labels": labels, "log_total": log_total, "grad": grad}
    arguments |= {"stride": logits.stride(0), "width": width, "tiles": tiles, "cap": cap or 0.0}
    arguments |= {"inverse": 1 / cap if cap else 0.0, "CAPPED": cap is not None}
    arguments |= {"BW": _tile(width)}
    return Launch("softmax gradient", gradient_kernel, (rows * tiles,), arguments, 8, 1)


def _vectors(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(logits.new_empty(len(logits), dtype=torch.float32) for _ in range(3))


@torch.library.custom_op("xlstm_kernels::softmax_statistics_triton", mutates_args=())
def statistics_triton(
    logits: Tensor, labels: Tensor, cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Triton backend of `softmax_statistics` (checked arguments, same meaning)."""
    out = _vectors(logits)
    run_all([plan_statistics(logits, labels.contiguous(), out, cap)], logits)
    return out


@statistics_triton.register_fake
def _(logits, labels, cap):
    return _vectors(logits)


@torch.library.custom_op("xlstm_kernels::softmax_gradient_triton", mutates_args=("logits",))
def gradient_triton(
    logits: Tensor, labels: Tensor, log_total: Tensor, grad: Tensor, cap: float | None
) -> None:
    """Triton backend of `softmax_gradient`, which returns `logits`."""
    vectors = (x.contiguous() for x in (labels, log_total, grad.float()))
    run_all([plan_gradient(logits, *vectors, cap)], logits)


@gradient_triton.register_fake
def _(logits, labels, log_total, grad, cap):
    return None
