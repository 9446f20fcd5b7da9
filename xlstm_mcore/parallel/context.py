"""Context parallelism: the sequence is cut into contiguous slices, one per context-parallel rank.

Rank r holds tokens `[r s/cp, (r + 1) s/cp)` of every row, and with sequence parallelism cuts
its slice further over the tensor-parallel ranks. Three things look across the cuts:

- The sLSTM and attention need all positions of a head at once. `ContextParallel.to_heads` turns a
  slice of the sequence with all of this rank's heads into the whole sequence with `1/cp` of them,
  by one all-to-all. The result goes back through `ContextParallel.from_heads`.
- A causal convolution needs the last `width - 1` tokens of the slice before
  (`ContextParallel.tokens_before`).
- The mLSTM needs the state at the end of the slice before (parallel/mlstm_state.py).

Document boundaries are bool `[b, s]` over the *whole* row on every rank. Every rank reads its own
rows, so nothing is sent for them. `ContextParallel.local_slice` cuts out this rank's slice.

Parameters are the same on all context-parallel ranks, and their gradients are summed over data- and
context-parallel ranks together (Megatron's `dp_cp` group). A rank that computes some of the heads
uses some of its parameters and leaves zeros in the rest of the gradient.
"""

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor


class ContextParallel:
    """This rank's place in the context-parallel group, and what crosses the cuts.

    All methods are the identity (or return None) in a group of one.

    Args:
        group: The context-parallel process group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, self.rank = group.size(), group.rank()

    def local_slice(self, x: Tensor | None, dim: int = 1) -> Tensor | None:
        """This rank's `1/cp` of a dimension: positions of a row, or heads of a parameter."""
        if x is None or self.size == 1:
            return x
        width = x.shape[dim] // self.size
        return x.narrow(dim, self.rank * width, width)

    def to_heads(self, x: Tensor) -> Tensor:
        """All positions of this rank's heads: `[s/cp, b, c] -> [s, b, c/cp]`.

        The last dimension is cut into `cp` equal parts, and part r belongs to context-parallel
        rank r. So a tensor of `heads * width` channels gives whole heads when `heads` (those of
        this tensor-parallel rank) is a multiple of `cp`. Several tensors of the same heads (q, k
        and v) go through separately, or stacked before the last dimension, as `[s/cp, b, 3, c]`.
        Strides are arbitrary. The backward pass is exactly `from_heads`.

        Under tensor parallelism this follows `TensorParallelRegion.to_heads`. Two all-to-alls
        move at most twice the bytes of one over both groups, but messages between nodes (context)
        are larger by the number of tensor-parallel ranks.
        """
        if self.size == 1:
            return x
        s, *middle, c = x.shape
        parts = x.reshape(s, *middle, self.size, c // self.size).movedim(-2, 0)
        # Megatron's all-to-all makes its input contiguous. On gloo a non-contiguous *output*
        # (empty_like of a permuted tensor) would be filled wrongly without an error.
        return tensor_parallel.all_to_all(self.group, parts.contiguous()).flatten(0, 1)

    def from_heads(self, x: Tensor) -> Tensor:
        """Inverse of `to_heads`: `[s, b, c/cp] -> [s/cp, b, c]`."""
        if self.size == 1:
            return x
        slices = x.unflatten(0, (self.size, -1)).contiguous()
        return tensor_parallel.all_to_all(self.group, slices).movedim(0, -2).flatten(-2)

    def tokens_before(self, x: Tensor, number: int, boundaries: Tensor | None) -> Tensor | None:
        """The last tokens of the slice before this one, the initial state of a causal convolution.

        Args:
            x: `[b, s/cp, c]`, the convolution's input.
            number: How many tokens: the convolution's width less one, at most `s/cp`.
            boundaries: Bool `[b, s]` of the whole row, or None.

        Returns:
            `[b, c, number]`, oldest first. Zeros on the first rank, and where a document starts
            after the token. None in a group of one. Its gradient goes back to the rank that holds
            the tokens.
        """
        if self.size == 1 or number == 0:
            return None
        last = x[:, x.shape[1] - number :]
        if boundaries is not None:
            started = self.local_slice(boundaries)[:, -number:].cumsum(1)
            last = last * (started == started[:, -1:])[..., None].to(x.dtype)
        return _FromRankBefore.apply(last.transpose(1, 2), self.group)


class _FromRankBefore(torch.autograd.Function):
    """A tensor of the rank before (zeros on the first); gradients travel the other way."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _shift(x, group, 1)

    @staticmethod
    def backward(ctx, grad):
        return _shift(grad, ctx.group, -1), None


def _shift(x: Tensor, group: dist.ProcessGroup, step: int) -> Tensor:
    """`x` of the rank `step` before this one in the group, or zeros where there is none."""
    x, rank, size = x.contiguous(), group.rank(), group.size()
    received = torch.zeros_like(x)
    messages = []
    if 0 <= rank - step < size:
        messages.append(dist.P2POp(dist.irecv, received, group=group, group_peer=rank - step))
    if 0 <= rank + step < size:
        messages.append(dist.P2POp(dist.isend, x, group=group, group_peer=rank + step))
    # As one operation: on NCCL each rank's send would otherwise wait for its receive.
    for work in dist.batch_isend_irecv(messages):
        work.wait()
    return received
