"""Vocabulary-parallel cross entropy with the logit soft-cap inside, a few rows at a time.

Written plainly, ``cross_entropy(cap * tanh(logits / cap))`` passes over the logits of the whole
micro-batch about ten times and keeps several fp32 copies of them; at a vocabulary of 50,304 that is
the largest tensor of the step. Here only one block of rows exists beside the logits, in fp32 and
small enough for a core's cache, and the gradient is written over them.
"""

import torch
import torch.distributed as dist
from torch import Tensor

# Elements of a block: it should stay in a CPU core's cache, and fill a GPU.
_BLOCK = {"cpu": 2**18}
_BLOCK_ON_ACCELERATOR = 2**26


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, soft_cap: float | None, group: dist.ProcessGroup
) -> Tensor:
    """Token losses in nats of soft-capped, vocabulary-parallel logits.

    ``loss = logsumexp(y) - y[label]`` with ``y = soft_cap * tanh(logits / soft_cap)`` (xLSTM 7B,
    section 3), or ``y = logits`` without a cap. The logsumexp is the usual one, shifted by the
    largest logit of all ranks.

    Args:
        logits: ``[..., vocab/tp]``, this rank's rows of the head in the order of ranks. Its memory
            is used for the capped logits and then for the gradient: nothing else may read it.
        labels: int64 ``[...]`` in the whole vocabulary.
        soft_cap: the cap, or None.
        group: the tensor-parallel group.

    Returns:
        Losses ``[...]``, the same on every rank, in fp32 (fp64 for fp64 logits).
    """
    return _CrossEntropy.apply(logits, labels, soft_cap, group)


class _CrossEntropy(torch.autograd.Function):
    """See :func:`vocab_parallel_cross_entropy`."""

    @staticmethod
    def forward(ctx, logits, labels, soft_cap, group):
        width = logits.shape[-1]
        rows = logits.detach().reshape(-1, width)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        local, mine = _local_labels(labels.reshape(-1), width, group.rank())

        largest = rows.new_empty(len(rows), dtype=dtype)
        total = torch.empty_like(largest)
        chosen = torch.empty_like(largest)
        for part in _blocks(rows):
            y = _cap_in_place(rows[part].to(dtype), soft_cap)
            chosen[part] = y.gather(1, local[part, None]).squeeze(1)
            largest[part] = y.amax(dim=1)
            total[part] = y.sub(largest[part, None]).exp_().sum(dim=1)
        chosen = torch.where(mine, chosen, 0.0)
        if group.size() > 1:
            over_all = largest.clone()
            dist.all_reduce(over_all, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack((total * (largest - over_all).exp(), chosen))
            dist.all_reduce(sums, group=group)
            largest, (total, chosen) = over_all, sums
        log_total = total.log() + largest
        ctx.save_for_backward(local, mine, log_total)
        # Not a saved tensor: autograd would object to its memory being used again.
        ctx.rows, ctx.soft_cap, ctx.shape = rows, soft_cap, logits.shape
        return (log_total - chosen).view(labels.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        local, mine, log_total = ctx.saved_tensors
        rows, ctx.rows = ctx.rows, None
        if rows is None:
            raise RuntimeError("the loss can be differentiated once: its memory is used again")
        cap, grad, dtype = ctx.soft_cap, grad.reshape(-1), log_total.dtype
        for part in _blocks(rows):
            y = rows[part]
            if y.dtype != dtype:  # the forward pass could not leave the capped logits there
                y = _cap_in_place(y.to(dtype), cap)
            d = y.sub(log_total[part, None]).exp_()  # softmax
            d.scatter_add_(1, local[part, None], -mine[part, None].to(dtype))
            d.mul_(grad[part, None])
            if cap is not None:  # times 1 - (y / cap)^2, the slope of the cap
                d.addcmul_(d * y, y, value=-(cap**-2))
            rows[part] = d
        return rows.view(ctx.shape), None, None, None


def _local_labels(labels: Tensor, width: int, rank: int) -> tuple[Tensor, Tensor]:
    """Labels in this rank's columns (0 for others'), and which of them are this rank's."""
    local = labels - rank * width
    mine = (local >= 0) & (local < width)
    return torch.where(mine, local, 0), mine


def _blocks(rows: Tensor) -> list[slice]:
    elements = _BLOCK.get(rows.device.type, _BLOCK_ON_ACCELERATOR)
    step = max(1, elements // rows.shape[1])
    return [slice(first, first + step) for first in range(0, len(rows), step)]


def _cap_in_place(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else x.div_(cap).tanh_().mul_(cap)
