"""Silent corruption: ranks that should hold the same bits are compared.

A memory or a link may change a bit without a word.

Every `guard.check_replicas` steps each rank hashes what others hold too, and the hashes are
compared: weights over the data-parallel replicas (also the optimizer state, where an optimizer does
not share it out), and over the tensor-parallel ranks the weights and the optimizer state of
replicated parameters, such as norms. A gradient that differed between tensor-parallel ranks shows
in the moments. Nothing can be compared of what only one rank holds: the weights of ZeRO stage 3 and
the partitions of the optimizer state.

A check reads each of these tensors once. One training step reads the weights several times, so at
the default interval of a thousand steps the check is far below a thousandth of the run.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xlstm_io.errors import MachineFailed

if TYPE_CHECKING:
    from pretrain.engines.base import Engine
    from pretrain.layout import Layout

CHUNK = 1 << 22  # elements hashed at a time: 8 bytes for each, twice
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Held:
    """A tensor that other ranks may hold too.

    Attributes:
        name: its global name.
        tensor: this rank's copy.
        over_data: whether every data-parallel replica holds the same.
        over_tensor: whether every tensor-parallel rank holds the same.
    """

    name: str
    tensor: Tensor
    over_data: bool
    over_tensor: bool


def bit_hash(tensor: Tensor) -> Tensor:
    """A hash of a tensor's bits, which every change of one bit changes: an int64 scalar.

    The bits of each element times an odd number of its own, summed modulo 2^64.
    """
    bits = tensor.detach().contiguous().view(-1).view(BITS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)
        odd = torch.arange(start, start + part.numel(), device=tensor.device) * 2 + 1
        total += (part * odd).sum()
    return total


def check_replicas(engine: "Engine", layout: "Layout", since: int) -> None:
    """Compare what several ranks hold; called by all ranks between two steps.

    Args:
        engine: holds the model and the optimizer state.
        layout: where this process stands.
        since: the step at which they were last compared, for the message.

    Raises:
        MachineFailed: something differs; the message names the tensors and the ranks. The same on
            every rank.
    """
    held = [(item, bit_hash(item.tensor).to(layout.device)) for item in engine.held()]
    groups = layout.groups
    found = [
        *_differences(
            "data-parallel replicas", groups.dp_cp, [(i.name, h) for i, h in held if i.over_data]
        ),
        *_differences(
            "tensor-parallel ranks", groups.tp, [(i.name, h) for i, h in held if i.over_tensor]
        ),
    ]
    everywhere = dict.fromkeys(text for texts in layout.gather(found) for text in texts)
    if everywhere:
        raise MachineFailed(
            "guard.check_replicas: these tensors are not the same on all ranks:\n  "
            + "\n  ".join(list(everywhere)[:10])
            + f"\nthey were the same at step {since}; leave out the machine of that rank, and go "
            "back to a checkpoint of that step or before with python -m pretrain rewind"
        )


def _differences(
    whose: str, group: torch.distributed.ProcessGroup, hashes: list[tuple[str, Tensor]]
) -> Iterator[str]:
    """A line for every tensor whose hash is not the same on all ranks of a group."""
    if group.size() == 1 or not hashes:
        return
    mine = torch.stack([value for _, value in hashes])
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    torch.distributed.all_gather(everyone, mine, group=group)
    table = torch.stack(everyone).tolist()
    ranks = torch.distributed.get_process_group_ranks(group)
    for number, (name, _) in enumerate(hashes):
        values = [row[number] for row in table]
        (usual, count), *others = Counter(values).most_common()
        if not others:
            continue
        odd = [str(rank) for rank, value in zip(ranks, values, strict=True) if value != usual]
        if count == others[0][1]:  # nobody is in the majority
            odd = [str(rank) for rank in ranks]
        yield f"{name} between {whose}: rank {', '.join(odd)} of {', '.join(map(str, ranks))}"
