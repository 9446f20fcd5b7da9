"""Where a local parameter lies in the model's named global tensors.

A local parameter stacks slices of several global tensors: the weight of the 7B-style block's input
projection holds this rank's heads of q, k, v and the output gate. Each `ParameterSlice` says which
slice of which global tensor lies where. These slices are the only description of the sharding.
Initialisation, checkpoints, export and parameter counts all read it, so none of them knows about
tensor parallelism.

The description rides on the `nn.Parameter` objects, because optimizers and wrappers hand back
parameters and not modules. These are all attributes that this project and Megatron put there:

- `slices` (`set_slices`): a tuple of `ParameterSlice`; `slices_of` reads it.
- `tensor_model_parallel` (`set_slices`): the parameter is sharded, so the gradient norm counts the
  shard of every rank.
- `partition_dim`, `partition_stride` (`set_slices`): the sharded dimension (-1 for none), and 1.
- `sequence_parallel` (`set_slices`): the parameter is replicated, but each rank saw only its part
  of the sequence, so gradients are summed over the tensor-parallel group.
- `shared` (Megatron): the last pipeline stage's copy of a tied embedding; `is_shared` reads it.
- `no_weight_decay` (the engines): the optimizer does not decay the parameter (`decay.py`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xlstm_mcore import hardware
from xlstm_mcore.config import XLSTMConfig


@dataclass(frozen=True)
class ParameterSlice:
    """A slice of a local parameter and its place in a global tensor.

    Attributes:
        name: Global name, such as `decoder.layers.3.mixer.q_proj.weight`.
        global_shape: Shape of the global tensor.
        global_offset: First element of the slice in the global tensor, per dimension.
        local_offset: First element of the slice in the local parameter, per dimension.
        shape: Shape of the slice, the same in both.
    """

    name: str
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    local_offset: tuple[int, ...]
    shape: tuple[int, ...]

    def local(self, parameter: Tensor) -> Tensor:
        """The view of `parameter` (local shape) that this slice covers."""
        return parameter[_index(self.local_offset, self.shape)]

    def of_global(self, tensor: Tensor) -> Tensor:
        """The view of the global `tensor` (global shape) that this slice covers."""
        return tensor[_index(self.global_offset, self.shape)]


def _index(offset: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def stacked_slices(
    global_shapes: Mapping[str, tuple[int, ...]], *, shard_dim: int, rank: int, size: int
) -> list[ParameterSlice]:
    """Slices of a parameter that stacks this rank's shard of several tensors along dimension 0.

    Args:
        global_shapes: Global shapes by global names, in the order of stacking.
        shard_dim: The dimension that is split over the ranks.
        rank: This rank in the tensor-parallel group.
        size: Ranks in the tensor-parallel group.

    Raises:
        ValueError: The dimension does not divide by `size`.
    """
    slices, row = [], 0
    for name, global_shape in global_shapes.items():
        shape, offset = list(global_shape), [0] * len(global_shape)
        if shape[shard_dim] % size:
            raise ValueError(
                f"{name}: dimension {shard_dim} of {global_shape} does not divide by "
                f"tensor parallel size {size}"
            )
        shape[shard_dim] //= size
        offset[shard_dim] = rank * shape[shard_dim]
        local = (row, *([0] * (len(shape) - 1)))
        slices.append(ParameterSlice(name, global_shape, tuple(offset), local, tuple(shape)))
        row += shape[0]
    return slices


def new_parameter(config: XLSTMConfig, slices: Sequence[ParameterSlice]) -> nn.Parameter:
    """An uninitialised parameter on the model's device, just large enough for its slices."""
    ends = ([o + n for o, n in zip(part.local_offset, part.shape, strict=True)] for part in slices)
    shape = [max(end) for end in zip(*ends, strict=True)]
    weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=hardware.device()))
    set_slices(weight, slices, sequence_parallel=config.sequence_parallel)
    return weight


def set_slices(
    parameter: nn.Parameter, slices: Sequence[ParameterSlice], *, sequence_parallel: bool = False
) -> None:
    """Record the slices on a parameter, and what Megatron reads of them (see the list above).

    Args:
        parameter: The local parameter.
        slices: Its slices; together they cover it.
        sequence_parallel: Whether the layer sees a part of the sequence on each tensor-parallel
            rank. This matters to replicated parameters only.
    """
    covered = sum(math.prod(part.shape) for part in slices)
    assert covered == parameter.numel(), (slices[0].name, covered, tuple(parameter.shape))
    parameter.slices = tuple(slices)
    first = slices[0]
    split = [i for i, n in enumerate(first.shape) if n != first.global_shape[i]]
    parameter.tensor_model_parallel = bool(split)
    parameter.partition_dim = split[0] if split else -1
    parameter.partition_stride = 1
    parameter.sequence_parallel = sequence_parallel and not split


def slices_of(parameter: Tensor) -> tuple[ParameterSlice, ...]:
    """The slices of a parameter of a model of this package."""
    return parameter.slices


def is_shared(parameter: Tensor) -> bool:
    """Whether this is the last pipeline stage's copy of a tied embedding, which counts once."""
    return getattr(parameter, "shared", False)


def named_slices(
    module: nn.Module,
) -> Iterator[tuple[str, nn.Parameter, tuple[ParameterSlice, ...]]]:
    """Every parameter of a module with its torch name and its slices."""
    for name, parameter in module.named_parameters():
        yield name, parameter, slices_of(parameter)


def slices_of_range(
    shape: Sequence[int], start: int, end: int
) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Cut the flat range `[start, end)` of a row-major tensor into slices.

    A distributed optimizer owns flat ranges of parameters, and checkpoint files hold slices.

    Returns:
        `(offset, shape, flat_start)` of each slice, in flat order. A range of an n-dimensional
        tensor gives at most `2 n - 1` of them.
    """
    if start >= end:
        return []
    if len(shape) == 1:
        return [((start,), (end - start,), start)]
    row = math.prod(shape[1:])
    first, last = start // row, (end - 1) // row
    slices = []

    def within_row(index: int, low: int, high: int) -> None:
        for offset, size, flat in slices_of_range(shape[1:], low, high):
            slices.append(((index, *offset), (1, *size), index * row + flat))

    if first == last and (start % row or end % row):
        within_row(first, start - first * row, end - first * row)
        return slices
    whole, behind = first, last + 1  # the rows that lie in the range from end to end
    if start % row:
        within_row(first, start - first * row, row)
        whole += 1
    tail = end % row
    behind -= bool(tail)
    if whole < behind:
        offset = (whole, *([0] * (len(shape) - 1)))
        slices.append((offset, (behind - whole, *shape[1:]), whole * row))
    if tail:
        within_row(last, 0, tail)
    return slices
