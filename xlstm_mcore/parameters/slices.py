"""Where a local parameter lies in the model's named global tensors.

A rank's parameter is a packing of rectangles ("slices") of global tensors: the weight of the
7B-style block's input projection holds this rank's heads of q, k, v and the output gate. The map
from slices to global names is the only description of the layout; initialisation, checkpoints,
export and parameter counts all read it, so none of them knows about tensor parallelism.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterSlice:
    """A rectangle of one local parameter and its place in a global tensor.

    Attributes:
        name: global name, such as `decoder.layers.3.mixer.q_proj.weight`.
        global_shape: shape of the global tensor.
        global_offset: first element of the rectangle in the global tensor.
        local_offset: first element of the rectangle in the local parameter.
        shape: shape of the rectangle, the same in both.
    """

    name: str
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    local_offset: tuple[int, ...]
    shape: tuple[int, ...]

    def local(self, parameter: Tensor) -> Tensor:
        """The view of `parameter` (local shape) that this slice covers."""
        return parameter[_slices(self.local_offset, self.shape)]

    def of_global(self, tensor: Tensor) -> Tensor:
        """The view of the canonical `tensor` (global shape) that this slice covers."""
        return tensor[_slices(self.global_offset, self.shape)]


def _slices(offset: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def packed(
    names: Sequence[str],
    global_shapes: Sequence[tuple[int, ...]],
    *,
    shard_dim: int | None,
    rank: int,
    size: int,
) -> list[ParameterSlice]:
    """Slices of a parameter that stacks this rank's shard of several tensors along dimension 0.

    Args:
        names: global names in the order of stacking.
        global_shapes: their global shapes.
        shard_dim: dimension split over `size` ranks, or None for replicated tensors.
        rank: this rank in the tensor-parallel group.
        size: ranks in the tensor-parallel group.
    """
    slices, row = [], 0
    for name, global_shape in zip(names, global_shapes, strict=True):
        shape, offset = list(global_shape), [0] * len(global_shape)
        if shard_dim is not None:
            if shape[shard_dim] % size:
                raise ValueError(
                    f"{name}: dimension {shard_dim} of {global_shape} does not divide by "
                    f"tensor parallel size {size}"
                )
            shape[shard_dim] //= size
            offset[shard_dim] = rank * shape[shard_dim]
        local = (row, *([0] * (len(shape) - 1)))
        slices.append(ParameterSlice(name, tuple(global_shape), tuple(offset), local, tuple(shape)))
        row += shape[0]
    return slices


def attach(
    parameter: nn.Parameter, slices: Sequence[ParameterSlice], *, sequence_parallel: bool = False
) -> None:
    """Record `slices` on a parameter and set the attributes that Megatron reads.

    Sharded parameters get `tensor_model_parallel` (the gradient norm counts each rank's shard),
    replicated ones `sequence_parallel` (each rank saw its slice of the sequence only, so their
    gradients are summed over the tensor-parallel group).
    """
    covered = sum(torch.Size(p.shape).numel() for p in slices)
    assert covered == parameter.numel(), (slices[0].name, covered, tuple(parameter.shape))
    parameter.slices = tuple(slices)
    first = slices[0]
    split = [i for i, n in enumerate(first.shape) if n != first.global_shape[i]]
    parameter.tensor_model_parallel = bool(split)
    parameter.partition_dim = split[0] if split else -1
    parameter.partition_stride = 1
    parameter.sequence_parallel = sequence_parallel and not split


def named_slices(
    module: nn.Module,
) -> Iterator[tuple[str, nn.Parameter, tuple[ParameterSlice, ...]]]:
    """Every parameter of a module with its torch name and its slices."""
    for name, parameter in module.named_parameters():
        yield name, parameter, parameter.slices


def parameter_slices(module: nn.Module) -> dict[str, list[ParameterSlice]]:
    """The slices of every parameter of a module, by the parameter's torch name."""
    return {name: list(slices) for name, _, slices in named_slices(module)}


def rectangles(
    shape: Sequence[int], start: int, end: int
) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Cut the flat range `[start, end)` of a row-major tensor into rectangles.

    A distributed optimizer owns flat ranges of parameters; checkpoint files hold rectangles. A
    range of an n-dimensional tensor is at most `2 n - 1` of them.

    Returns:
        `(offset, shape, flat_start)` per rectangle, in flat order.
    """
    if start >= end:
        return []
    if len(shape) == 1:
        return [((start,), (end - start,), start)]
    row = 1
    for n in shape[1:]:
        row *= n
    first, last = start // row, (end - 1) // row
    slices = []

    def inside(index: int, lo: int, hi: int) -> None:
        for offset, size, flat in rectangles(shape[1:], lo, hi):
            slices.append(((index, *offset), (1, *size), index * row + flat))

    if first == last and (start % row or end % row):
        inside(first, start - first * row, end - first * row)
        return slices
    lo, hi = first, last + 1
    if start % row:
        inside(first, start - first * row, row)
        lo += 1
    tail = end % row
    hi -= bool(tail)
    if lo < hi:
        slices.append(((lo, *([0] * (len(shape) - 1))), (hi - lo, *shape[1:]), lo * row))
    if tail:
        inside(last, 0, tail)
    return slices
