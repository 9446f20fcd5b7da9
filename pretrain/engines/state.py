"""From what a rank holds of a parameter to the slices of the checkpoint.

An optimizer that partitions its state over data-parallel ranks gives each of them flat ranges of
parameters; the checkpoint holds rectangular slices of global tensors
(`xlstm_mcore.parameters.slices`). Every engine saves and loads through these functions, so what
one engine wrote another reads.
"""

import math
from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import Tensor

from pretrain.checkpoint import TensorSlice
from pretrain.layout import Layout
from xlstm_mcore.parameters.slices import ParameterSlice, is_shared, slices_of_range

# What is kept of each weight, by torch's names in Adam; "param" is the fp32 master weight.
OPTIMIZER_STATE = ("param", "exp_avg", "exp_avg_sq")


def optimizer_prefix(key: str) -> str:
    """Prefix of a global name for one kind of optimizer state, one of `OPTIMIZER_STATE`."""
    return f"optimizer.state.{key}."


MASTER = optimizer_prefix("param")


def weight_slices(parameter: Tensor, slices: Sequence[ParameterSlice]) -> list[TensorSlice]:
    """The slices of a whole local parameter."""
    return [
        TensorSlice(
            part.name, part.global_shape, part.global_offset, part.local(parameter.detach())
        )
        for part in slices
    ]


def partition_slices(
    slices: Sequence[ParameterSlice],
    shape: Sequence[int],
    partition: Tensor,
    start: int,
    end: int,
    prefix: str = "",
) -> Iterator[TensorSlice]:
    """Cut a partition's flat range `[start, end)` of a parameter into slices of global tensors.

    Args:
        slices: where the parameter lies in global tensors.
        shape: the local parameter's shape.
        partition: flat tensor of `end - start` elements; the slices are views of it.
        start: first element of the range in the flattened local parameter.
        end: element after the last.
        prefix: put before the global names, see `optimizer_prefix`.
    """
    for offset, size, flat in slices_of_range(shape, start, end):
        values = partition[flat - start : flat - start + math.prod(size)].view(size)
        for part in slices:
            low = [max(a, b) for a, b in zip(offset, part.local_offset, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(offset, size, part.local_offset, part.shape, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            inside = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            place = tuple(
                g + a - b
                for g, a, b in zip(part.global_offset, low, part.local_offset, strict=True)
            )
            yield TensorSlice(prefix + part.name, part.global_shape, place, values[inside])


def is_owner(parameter: Tensor, layout: Layout) -> bool:
    """Whether this rank's copy is the one that counts among tensor-parallel and tied ones."""
    if is_shared(parameter):
        return False  # the last stage's copy of a tied embedding
    return parameter.tensor_model_parallel or layout.groups.tp.rank() == 0


def shared_out(sizes: Sequence[int], ranks: int) -> list[int]:
    """Who owns what: the largest first, each to the rank that has least, the first of several."""
    loads, owners = [0] * ranks, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += sizes[number]
    return owners


def with_owners(parameters: Sequence[Tensor], group: dist.ProcessGroup) -> list[tuple[Tensor, int]]:
    """Each parameter with the rank of a group that owns it, in the same order on every rank."""
    owners = shared_out([parameter.numel() for parameter in parameters], group.size())
    return list(zip(parameters, owners, strict=True))


def send_from_owners(owned: Sequence[tuple[Tensor, int]], group: dist.ProcessGroup) -> None:
    """Give every rank of a group what its owner has of each parameter; called by all of them.

    Args:
        owned: see `with_owners`.
        group: the ranks.
    """
    if group.size() == 1:
        return
    sent = [
        dist.broadcast(parameter.detach(), group=group, group_src=owner, async_op=True)
        for parameter, owner in owned
    ]
    for work in sent:
        work.wait()
