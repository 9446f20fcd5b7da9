"""Faults that are planted in one rank of a rehearsal, with either engine."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

import torch
import torch.distributed as dist

from pretrain.engines import model
from pretrain.engines.base import Engine
from pretrain.engines.verdict import Guard
from pretrain.rehearsal import device as rehearsed
from pretrain.rehearsal.device import RehearsalMode


def one_sided_collective() -> AbstractContextManager:
    """A sum that one rank alone asks for."""
    judge = Guard.judge

    def judge_and_sum(self, loss, grad_norm, votes=()):
        dist.all_reduce(grad_norm.clone())
        return judge(self, loss, grad_norm, votes)

    return mock.patch.object(Guard, "judge", judge_and_sum)


def wrong_group() -> AbstractContextManager:
    """The loss is summed over the tensor-parallel ranks instead of the pipeline's."""

    def sum_losses(losses, layout, sources):
        total = torch.stack(losses).sum(0) if losses else torch.zeros(2, device=layout.device)
        total = total.double()
        dist.all_reduce(total, group=layout.groups.dp_cp)
        dist.all_reduce(total, group=layout.groups.tp)
        return total

    return mock.patch.object(model, "sum_losses", sum_losses)


def missing_receive() -> AbstractContextManager:
    """The first message of the pipeline is not received."""
    batch = RehearsalMode.batch_isend_irecv
    seen = []

    def all_but_one(mode, operations):
        if not seen and any(one.op is dist.irecv for one in operations):
            seen.append(operations)
            (lost,) = [one for one in operations if one.op is dist.irecv]
            # Something to wait for, without a message.
            return [dist.all_reduce(lost.tensor, group=one_rank_group(), async_op=True)]
        return batch(mode, operations)

    return mock.patch.object(RehearsalMode, "batch_isend_irecv", all_but_one)


def ring(group: dist.ProcessGroup, *operations: Callable, batch: bool = False) -> None:
    """Each rank receives from the rank before it, and sends to the one behind it.

    Args:
        group: the ring.
        operations: `dist.irecv` and `dist.isend`, in the order in which a rank asks for them.
        batch: whether they start together.
    """
    size, place = group.size(), group.rank()
    peers = {dist.irecv: (place - 1) % size, dist.isend: (place + 1) % size}
    tensors = {one: torch.empty(4, device=rehearsed.device()) for one in operations}
    if batch:
        messages = [
            dist.P2POp(one, tensors[one], group=group, group_peer=peers[one]) for one in operations
        ]
        work = dist.batch_isend_irecv(messages)
    else:
        sides = {dist.irecv: "group_src", dist.isend: "group_dst"}
        work = [one(tensors[one], group=group, **{sides[one]: peers[one]}) for one in operations]
    for one in work:
        one.wait()


def one_rank_group() -> dist.ProcessGroup:
    """A group of this rank alone."""
    from megatron.core import parallel_state

    return parallel_state.get_context_parallel_group()


def forgotten_wait(engine: type[Engine]) -> AbstractContextManager:
    """The norm of the gradient is read on the host, by a line that somebody left there."""
    norm = engine.gradient_norm

    def read_norm(self):
        found = norm(self)
        found.item()
        return found

    return mock.patch.object(engine, "gradient_norm", read_norm)
