"""How activations enter and leave the tensor-parallel part of a layer."""

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from xlstm_mcore.config import XLSTMConfig


class TensorParallelRegion:
    """How a mixer's input enters, and its output leaves, the tensor-parallel region.

    Outside the region activations are `[s, b, h]` on every rank, or `[s/tp, b, h]` with
    sequence parallelism. Inside, a rank sees the whole sequence and its own heads or channels.
    The backward pass of each method is its adjoint, so gradients need no further reduction.

    Args:
        config: The model's configuration (`sequence_parallel` is read).
        group: The tensor-parallel process group.
    """

    def __init__(self, config: XLSTMConfig, group: torch.distributed.ProcessGroup) -> None:
        self.group = group
        self.size = group.size()
        self.rank = group.rank()
        self.sequence_parallel = config.sequence_parallel and self.size > 1

    def gather(self, x: Tensor) -> Tensor:
        """All channels at every position: `[s(/tp) * b, h] -> [s * b, h]`."""
        if self.size == 1:
            return x
        if self.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(x, group=self.group)
        return tensor_parallel.copy_to_tensor_model_parallel_region(x, group=self.group)

    def to_heads(self, x: Tensor) -> Tensor:
        """This rank's channels at every position: `[s(/tp), b, h] -> [s, b, h/tp]`.

        With sequence parallelism this is one all-to-all, so nothing is gathered that is not used.
        """
        if self.sequence_parallel:
            s, b, h = x.shape
            out = tensor_parallel.all_to_all_sp2hp(x, group=self.group)
            return out.view(s * self.size, b, h // self.size)
        return tensor_parallel.scatter_to_tensor_model_parallel_region(x, group=self.group)

    def from_heads(self, x: Tensor) -> Tensor:
        """Inverse of `to_heads`: `[s, b, h/tp] -> [s(/tp), b, h]`."""
        if self.sequence_parallel:
            s, b, h = x.shape
            out = tensor_parallel.all_to_all_hp2sp(x.reshape(s * b, h), group=self.group)
            return out.view(s // self.size, b, h * self.size)
        return tensor_parallel.gather_from_tensor_model_parallel_region(x, group=self.group)

    def gather_columns(self, x: Tensor) -> Tensor:
        """All ranks' parts of the last dimension, side by side: `[..., c/tp] -> [..., c]`."""
        if self.size == 1:
            return x
        return tensor_parallel.all_gather_last_dim_from_tensor_parallel_region(x, group=self.group)

    def sum(self, x: Tensor) -> Tensor:
        """Sum partial results over ranks, for each rank to use in its own part of what follows."""
        total = tensor_parallel.reduce_from_tensor_model_parallel_region(x, group=self.group)
        return tensor_parallel.copy_to_tensor_model_parallel_region(total, group=self.group)

    def sum_and_split(self, x: Tensor) -> Tensor:
        """Sum partial results over ranks and keep this rank's slice of the last dimension."""
        total = tensor_parallel.reduce_from_tensor_model_parallel_region(x, group=self.group)
        return tensor_parallel.scatter_to_tensor_model_parallel_region(total, group=self.group)
