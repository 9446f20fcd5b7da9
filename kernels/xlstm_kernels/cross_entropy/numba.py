"""Sums over soft-capped logits on the CPU, and their gradient: each reads the logits once."""

import torch
from torch import Tensor

from xlstm_kernels.common.numba.tasks import run_tasks, unsupported_reason

__all__ = ["gradient_numba", "statistics_numba", "unsupported_reason"]


@torch.library.custom_op("xlstm_kernels::softmax_statistics_numba", mutates_args=())
def statistics_numba(
    logits: Tensor, labels: Tensor, cap: float | None, shifts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Numba backend of `softmax_statistics`; `shifts` is whether the largest is subtracted."""
    from xlstm_kernels.cross_entropy import numba_loops

    out = _vectors(logits)
    rows, width = logits.shape
    run_tasks(
        numba_loops.statistics, rows, width, logits.stride(0), cap or 0.0, shifts,
        logits, labels.contiguous(), *out,
    )  # fmt: skip
    return out


@statistics_numba.register_fake
def _(logits, labels, cap, shifts):
    return _vectors(logits)


@torch.library.custom_op("xlstm_kernels::softmax_gradient_numba", mutates_args=("logits",))
def gradient_numba(
    logits: Tensor, labels: Tensor, log_total: Tensor, grad: Tensor, cap: float | None
) -> None:
    """Numba backend of `softmax_gradient`, which returns `logits`."""
    from xlstm_kernels.cross_entropy import numba_loops

    rows, width = logits.shape
    vectors = labels.contiguous(), log_total.float().contiguous(), grad.float().contiguous()
    run_tasks(
        numba_loops.gradient, rows, width, logits.stride(0), cap or 0.0, *vectors, logits,
    )  # fmt: skip


@gradient_numba.register_fake
def _(logits, labels, log_total, grad, cap):
    return None


def _vectors(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(logits.new_empty(len(logits)) for _ in range(3))
