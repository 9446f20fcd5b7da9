"""Vocabulary-parallel cross entropy with the logit soft cap inside, computed in parts.

Written plainly, `cross_entropy(cap * tanh(logits / cap))` passes over the logits of the whole
micro-batch about ten times and keeps several fp32 copies of them. At a vocabulary of 50,304 the
logits are the largest tensor of the step. There are two ways around this, by their size:

- If the logits fit, `vocab_parallel_cross_entropy` holds them once, in their own type, with fp32
  copies of a few rows beside them (none where a kernel reads them once), and writes the gradient
  over them.
- If they do not fit, `linear_cross_entropy` never holds them all. It takes the head's weight a
  slice of the vocabulary at a time, in the forward pass for the logsumexp and again in the backward
  pass for the gradients, which costs one more product with the head (1 % of a 7B's step). Slices
  are taken of the vocabulary and not of the rows, because the weight gradient of each slice is then
  one product, written where it belongs. Only the small gradient of the hidden states is a sum over
  slices, in fp32.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from xlstm_kernels import softmax_gradient, softmax_statistics
from xlstm_kernels.cross_entropy.cross_entropy import cross_entropy_backend
from xlstm_mcore.modules.products import add_product

# Logits that are handled at a time: they should stay in a CPU core's cache, and fill a GPU.
_ELEMENTS = {"cpu": 2**18}
_ELEMENTS_ON_ACCELERATOR = 2**26


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    soft_cap: float | None,
    group: dist.ProcessGroup,
    tokens: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Token losses in nats of soft-capped, vocabulary-parallel logits.

    `loss = logsumexp(y) - y[label]` with `y = soft_cap * tanh(logits / soft_cap)` (xLSTM 7B,
    section 3), or `y = logits` without a cap. The logsumexp is the usual one, shifted by the
    largest logit of all ranks.

    Args:
        logits: `[..., vocab/tp]`, from this rank's rows of the head, in the order of ranks. Its
            memory is used for the gradient: nothing else may read it afterwards.
        labels: Int64 `[...]` in the whole vocabulary.
        soft_cap: The cap, or None.
        group: The tensor-parallel group.
        tokens: Columns of the whole vocabulary that count; those behind them are padding, as if
            their logits were minus infinity. None for all. Every label is below it.
        backend: Of the kernels, "torch" or "triton"; None for the best one.

    Returns:
        Losses `[...]`, the same on every rank, in fp32 (fp64 for fp64 logits).
    """
    return _CrossEntropy.apply(logits, labels, soft_cap, group, tokens, backend)


def slice_bytes_of(tokens: int, columns: int, size: int, mib: int) -> int | None:
    """Memory of a slice of logits in fp32 where all of them take more than `mib`, else None.

    Args:
        tokens: Rows of the logits.
        columns: This rank's part of the vocabulary.
        size: Bytes of one logit.
        mib: `memory.logits_mib`.
    """
    limit = mib * 2**20
    return None if tokens * columns * size <= limit else max(limit // 2, 2**24)


def logit_widths(tokens: int, columns: int, real: int, size: int, mib: int) -> list[int]:
    """Columns that the kernels of the loss see at a time, each number once.

    `real` of the columns have a token; for the others see `slice_bytes_of`.
    """
    held = slice_bytes_of(tokens, columns, size, mib)
    width = real if held is None else min(real, _slice_width(held, tokens, max(size, 4)))
    return sorted({width, real % width or width})


def _slice_width(held: int, tokens: int, size: int) -> int:
    return max(1, held // (size * tokens))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    soft_cap: float | None,
    group: dist.ProcessGroup,
    slice_bytes: int,
    tokens: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The losses of `vocab_parallel_cross_entropy(hidden @ weight.T, ...)` without the logits.

    Args:
        hidden: `[..., h]`, the same on every rank of the group. Its gradient is this rank's term
            of a sum over the group.
        weight: `[vocab/tp, h]`, this rank's rows of the head.
        labels: Int64 `[...]` in the whole vocabulary.
        soft_cap: The cap, or None.
        group: The tensor-parallel group.
        slice_bytes: Memory of one slice of logits in fp32; at least one column is taken.
        tokens: See `vocab_parallel_cross_entropy`.
        backend: See `vocab_parallel_cross_entropy`.

    Returns:
        Losses `[...]`, the same on every rank, in fp32 (fp64 for fp64 hidden states).
    """
    return _LinearCrossEntropy.apply(
        hidden, weight, labels, soft_cap, group, slice_bytes, tokens, backend
    )


class _CrossEntropy(torch.autograd.Function):
    """See `vocab_parallel_cross_entropy`."""

    @staticmethod
    def forward(ctx, logits, labels, soft_cap, group, tokens, backend):
        width = logits.shape[-1]
        rows = logits.detach().reshape(-1, width)
        real = _real_columns(width, tokens, group)
        labels_here = labels.reshape(-1) - group.rank() * width
        ctx.backend = cross_entropy_backend(rows[:, :real], backend)
        ctx.parts = _row_slices(rows, ctx.backend) if real else []
        found = [
            softmax_statistics(rows[part, :real], labels_here[part], soft_cap, backend=ctx.backend)
            for part in ctx.parts
        ]
        if len(found) > 1:
            found = [tuple(map(torch.cat, zip(*found, strict=True)))]
        log_total, chosen = _over_ranks(*(found[0] if real else _of_no_columns(rows)), group)
        ctx.save_for_backward(labels_here, log_total)
        # Not a saved tensor: autograd would object to its memory being used again.
        ctx.rows, ctx.soft_cap, ctx.shape, ctx.real = rows, soft_cap, logits.shape, real
        return (log_total - chosen).view(labels.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        labels_here, log_total = ctx.saved_tensors
        rows, ctx.rows = ctx.rows, None
        if rows is None:
            raise RuntimeError("the loss can be differentiated once: its memory is used again")
        rows[:, ctx.real :] = 0.0
        grad = grad.reshape(-1)
        for part in ctx.parts:
            given = labels_here[part], log_total[part], grad[part], ctx.soft_cap
            softmax_gradient(rows[part, : ctx.real], *given, backend=ctx.backend)
        return rows.view(ctx.shape), *[None] * 5


class _LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, soft_cap, group, slice_bytes, tokens, backend):
        rows = hidden.reshape(-1, hidden.shape[-1])
        labels_here = labels.reshape(-1) - group.rank() * len(weight)
        real = _real_columns(len(weight), tokens, group)
        largest, total, chosen = _of_no_columns(rows)
        width = _slice_width(slice_bytes, len(rows), total.dtype.itemsize)
        for first in range(0, real, width):
            logits = rows @ weight[first : min(first + width, real)].t()
            top, more, own = softmax_statistics(
                logits, labels_here - first, soft_cap, backend=backend
            )
            before, largest = largest, torch.maximum(largest, top)
            total = total * (before - largest).exp() + more * (top - largest).exp()
            chosen += own
        log_total, chosen = _over_ranks(largest, total, chosen, group)
        ctx.save_for_backward(rows, weight, labels_here, log_total)
        ctx.soft_cap, ctx.width, ctx.shape, ctx.real = soft_cap, width, hidden.shape, real
        ctx.backend = backend
        return (log_total - chosen).view(labels.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, weight, labels_here, log_total = ctx.saved_tensors
        grad, dtype = grad.reshape(-1), log_total.dtype
        d_rows, d_weight = torch.zeros_like(rows, dtype=dtype), torch.empty_like(weight)
        d_weight[ctx.real :] = 0.0
        for first in range(0, ctx.real, ctx.width):
            part = weight[first : min(first + ctx.width, ctx.real)]
            given = rows @ part.t(), labels_here - first, log_total, grad, ctx.soft_cap
            d = softmax_gradient(*given, backend=ctx.backend)
            torch.mm(d.t(), rows, out=d_weight[first : first + len(part)])
            add_product(d_rows, d, part)
        return d_rows.to(rows.dtype).view(ctx.shape), d_weight, *[None] * 6


def _real_columns(width: int, tokens: int | None, group: dist.ProcessGroup) -> int:
    """How many of this rank's `width` columns have a token."""
    return width if tokens is None else min(max(tokens - group.rank() * width, 0), width)


def _of_no_columns(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `softmax_statistics` says of no columns at all."""
    total = rows.new_zeros(len(rows), dtype=torch.promote_types(rows.dtype, torch.float32))
    return torch.full_like(total, -torch.inf), total, total.clone()


def _over_ranks(
    largest: Tensor, total: Tensor, chosen: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Logsumexp and the label's logit over all ranks, from each rank's part of the vocabulary.

    Args:
        largest: Largest logit of each row on this rank.
        total: Sum of `exp(logit - largest)`.
        chosen: The label's logit, 0 where another rank has it.
        group: The tensor-parallel group.
    """
    if group.size() > 1:
        over_all = largest.clone()
        dist.all_reduce(over_all, op=dist.ReduceOp.MAX, group=group)
        sums = torch.stack((total * (largest - over_all).exp(), chosen))
        dist.all_reduce(sums, group=group)
        largest, (total, chosen) = over_all, sums
    return total.log() + largest, chosen


def _row_slices(rows: Tensor, backend: str) -> list[slice]:
    """As many rows as are handled at a time; a kernel takes all, and makes no copies of them."""
    if backend != "torch":
        return [slice(None)]
    elements = _ELEMENTS.get(rows.device.type, _ELEMENTS_ON_ACCELERATOR)
    step = max(1, elements // rows.shape[1])
    return [slice(first, first + step) for first in range(0, len(rows), step)]
