"""Sums over soft-capped logits, and their gradient, over a part of the vocabulary.

A cross entropy over a vocabulary that is split (over ranks, or over time to save memory) puts these
together: `loss = log(sum of total * exp(shift)) - chosen`. Neither function records a gradient:
the second is that of the first.
"""

import torch
from torch import Tensor

from xlstm_kernels.common.backends import select_backend
from xlstm_kernels.common.checks import check_float, check_like, check_no_tangents, compute_dtype


@torch.no_grad()
def softmax_statistics(
    logits: Tensor, labels: Tensor, soft_cap: float | None, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of `y = soft_cap * tanh(logits / soft_cap)`, or of `y = logits` without a cap.

    Args:
        logits: [rows, width], any float dtype.
        labels: Int64 [rows]; those outside of `0 .. width - 1` choose nothing.
        soft_cap: The cap, or None.
        backend: "torch", "triton" or "numba"; None for the best one.

    Returns:
        In float32 (float64 for float64 logits), [rows] each: a shift, the sum of `exp(y - shift)`,
        and the label's y (0 where it chooses nothing). The shift is the largest y, or 0 where a cap
        makes it needless.

    Raises:
        ValueError: For wrong shapes, dtypes, devices or options.
        NotImplementedError: For forward-mode differentiation.
    """
    check_no_tangents("softmax_statistics", logits)
    chosen = _checked_backend(logits, backend)
    if chosen == "triton":
        from xlstm_kernels.cross_entropy.triton import statistics_triton

        return statistics_triton(logits, labels, soft_cap)
    if chosen == "numba":
        from xlstm_kernels.cross_entropy.numba import statistics_numba

        return statistics_numba(logits, labels, soft_cap, not needs_no_shift(soft_cap))
    y = _capped(logits, soft_cap)
    local, mine = _local(labels, logits.shape[1])
    chosen = torch.where(mine, y.gather(1, local[:, None]).squeeze(1), 0.0)
    if needs_no_shift(soft_cap):
        return y.new_zeros(len(y)), y.exp_().sum(dim=1), chosen
    largest = y.amax(dim=1)
    return largest, y.sub_(largest[:, None]).exp_().sum(dim=1), chosen


def cross_entropy_backend(logits: Tensor, backend: str | None) -> str:
    """Name of the backend that both functions take."""
    rows, width = logits.shape
    return select_backend("cross_entropy", backend, logits, width=width, elements=rows * width)


def _checked_backend(logits: Tensor, backend: str | None) -> str:
    """The backend, which can read these logits where they are: they are written there too."""
    check_float("logits", logits, 2, "[rows, width]")
    chosen = cross_entropy_backend(logits, backend)
    if chosen != "torch" and logits.stride(1) != 1:
        raise ValueError(
            f"logits have strides {list(logits.stride())}, but their columns must lie side by "
            "side; make them contiguous"
        )
    return chosen


def needs_no_shift(soft_cap: float | None) -> bool:
    """Whether float32 holds the exponentials of all capped logits, and their sum."""
    return soft_cap is not None and soft_cap <= 64.0


@torch.no_grad()
def softmax_gradient(
    logits: Tensor,
    labels: Tensor,
    log_total: Tensor,
    grad: Tensor,
    soft_cap: float | None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The gradient of losses with respect to logits, written over the logits.

    Args:
        logits: [rows, width]; they are gone afterwards.
        labels: As in `softmax_statistics`.
        log_total: [rows], the logsumexp of y over the whole vocabulary.
        grad: [rows], the gradient of each row's loss.
        soft_cap: The cap, or None.
        backend: As in `softmax_statistics`.

    Returns:
        The gradient, in the memory and dtype of `logits`.

    Raises:
        ValueError: For wrong shapes, dtypes, devices or options.
        NotImplementedError: For forward-mode differentiation.
    """
    check_no_tangents("softmax_gradient", logits, log_total, grad)
    chosen = _checked_backend(logits, backend)
    for name, vector in (("log_total", log_total), ("grad", grad)):
        check_like(name, vector, (len(logits),), "[rows]", logits)
    if chosen == "triton":
        from xlstm_kernels.cross_entropy.triton import gradient_triton

        gradient_triton(logits, labels, log_total, grad, soft_cap)
        return logits
    if chosen == "numba":
        from xlstm_kernels.cross_entropy.numba import gradient_numba

        gradient_numba(logits, labels, log_total, grad, soft_cap)
        return logits
    y = _capped(logits, soft_cap)
    d = y.sub(log_total[:, None]).exp_()  # softmax
    local, mine = _local(labels, logits.shape[1])
    d.scatter_add_(1, local[:, None], -mine[:, None].to(d.dtype))
    d.mul_(grad[:, None])
    if soft_cap is not None:  # times 1 - (y / cap)^2, the slope of the cap
        d.addcmul_(d * y, y, value=-(soft_cap**-2))
    return logits.copy_(d)


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    """A new tensor."""
    y = logits.to(compute_dtype(logits.dtype), copy=True)
    return y if cap is None else y.div_(cap).tanh_().mul_(cap)


def _local(labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Labels as an index, 0 where they choose nothing, and where they choose."""
    mine = (labels >= 0) & (labels < width)
    return torch.where(mine, labels, 0), mine
