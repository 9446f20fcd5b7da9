"""Agreement of all ranks that one of them was asked to stop.

Ranks get the signal in different steps. They must agree before one leaves the loop, or the others
would wait for it in the next collective: `any_rank` takes the maximum over all, once per step. The
signals themselves are read by `xlstm_io.signals`.
"""

from collections.abc import Sequence
from typing import Any

from xlstm_io.signals import StopSignal

__all__ = ["StopSignal", "any_rank"]


def any_rank(flags: Sequence[bool], device: Any = "cpu", group: Any = None) -> list[bool]:
    """For each flag, whether it is set on any rank of `group`; collective, the same everywhere.

    device: where the group's backend wants its tensors. Without an initialised process group the
    answer is this process's own flags.
    """
    import torch.distributed as dist
    from torch import int32, tensor

    if not dist.is_initialized():
        return list(flags)
    values = tensor([int(flag) for flag in flags], dtype=int32, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return [bool(value) for value in values.tolist()]
