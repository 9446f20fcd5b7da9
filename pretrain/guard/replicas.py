"""Silent corruption: ranks that should hold or compute the same bits are compared.

A memory, a link or an arithmetic unit may change a bit without a word. Every `guard.check_replicas`
steps two things are looked at:

- What several ranks hold is hashed, and the hashes are compared: weights over the data-parallel
  replicas (also optimizer state and gradients, where an optimizer does not share them out), and
  over the tensor-parallel ranks the weights, gradients and optimizer state of replicated
  parameters, such as norms. What only one rank holds cannot be compared: the weights of ZeRO stage
  3 and the partitions of the optimizer state.
- Each replica computes its first micro-batch twice without gradients, and that of the replica
  before it once. So every micro-batch is computed by two machines, also at ZeRO stage 3. Sums of
  fp32 losses are exact in fp64, so one wrong bit in the loss of one token is seen.

The first reads each tensor once, the second takes three forward passes of one micro-batch: less
than one micro-batch of one step in a thousand. `python -m benchmarks.trainer_overhead` measures
both.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.data import Batch
from pretrain.watching.metrics import MetricLogger
from pretrain.watching.watcher import StepWatcher, WatchedStep
from xlstm_io.errors import MachineFailed
from xlstm_mcore import hardware

if TYPE_CHECKING:
    from pretrain.config import RunConfig
    from pretrain.engines.base import Engine, Held
    from pretrain.layout import Layout

CHUNK = 1 << 22  # elements hashed at a time: 8 bytes for each, twice
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SHOWN = 10  # differences that a message names


@dataclass(frozen=True)
class Hashed:
    """The hash of a tensor that other ranks hold too; see `Held`."""

    name: str
    value: Tensor
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


class ReplicaWatcher(StepWatcher):
    """Checks every `guard.check_replicas`-th step, before what it left could be saved.

    Args:
        config: the run.
        layout: where this process stands.
        engine: holds the model and the optimizer state.
    """

    def __init__(self, config: "RunConfig", layout: "Layout", engine: "Engine") -> None:
        self.every, self._layout, self._engine = config.guard.check_replicas, layout, engine
        self._deterministic = config.run.deterministic
        self._gradients: list[Hashed] = []

    def before_update(self) -> None:
        """Hash the gradient, which does not outlive the step."""
        self._gradients = hashes(self._engine.held_gradients(), self._layout)

    def tell(self, seen: WatchedStep, metrics: MetricLogger) -> None:
        """Compare; raises MachineFailed where something differs."""
        since = seen.step - self.every
        check_replicas(self._engine, self._layout, since, self._gradients)
        self._gradients = []
        for line in check_twice(
            self._engine, self._layout, seen.batches[0], since, deterministic=self._deterministic
        ):
            metrics.message(line)


def hashes(held: Iterable["Held"], layout: "Layout") -> list[Hashed]:
    """Hashes of what other ranks of this layout hold too, in the order in which it comes."""
    data, tensor = layout.groups.dp_cp.size() > 1, layout.groups.tp.size() > 1
    return [
        Hashed(one.name, bit_hash(one.tensor).to(layout.device), one.over_data, one.over_tensor)
        for one in held
        if (one.over_data and data) or (one.over_tensor and tensor)
    ]


def check_replicas(
    engine: "Engine", layout: "Layout", since: int, more: Iterable[Hashed] = ()
) -> None:
    """Compare what several ranks hold; called by all ranks between two steps.

    Args:
        engine: holds the model and the optimizer state.
        layout: where this process stands.
        since: the step at which they were last compared, for the message.
        more: hashes that were taken before.

    Raises:
        MachineFailed: something differs; the message names the tensors and the ranks. The same on
            every rank.
    """
    taken = [*more, *hashes(engine.held(), layout)]
    groups = layout.groups
    over_data = [(one.name, one.value) for one in taken if one.over_data]
    over_tensor = [(one.name, one.value) for one in taken if one.over_tensor]
    found = [
        *_differences("data-parallel replicas", groups.dp_cp, over_data),
        *_differences("tensor-parallel ranks", groups.tp, over_tensor),
    ]
    everywhere = dict.fromkeys(text for texts in layout.gather(found) for text in texts)
    _raise(list(everywhere), since, "these tensors are not the same on all ranks")


def check_twice(
    engine: "Engine", layout: "Layout", batch: Batch, since: int, *, deterministic: bool
) -> list[str]:
    """Compute one micro-batch of each replica on two replicas; called by all ranks.

    Replicas on devices of different makes round differently and are not compared.

    Args:
        engine: holds the model.
        layout: where this process stands.
        batch: this replica's micro-batch.
        since: the step at which this was last done, for the message.
        deterministic: whether every operation is to give the same bits each time. Where it is not,
            a rank that differs from itself proves nothing, and replicas are not compared then.

    Returns:
        What a person is to be told of such ranks, the same on every rank.

    Raises:
        MachineFailed: the losses differ; the message names the ranks. The same on every rank.
    """
    group = layout.groups.dp
    if group.size() == 1:
        return []
    # Every row is a source of its own, because the sums of sources are kept in fp64.
    rows = torch.eye(len(batch.tokens), dtype=torch.float64)
    own = replace(batch, sources=rows).to(layout.device)
    other = Batch(*(_of_the_replica_before(part, group) for part in vars(own).values()))
    computed = []
    for micro_batch in (own, own, other):
        engine.evaluate([micro_batch])
        computed.append(engine.own_losses[0] if engine.own_losses else None)
    first, again, borrowed = computed
    before = dist.get_process_group_ranks(group)[group.rank() - 1]
    twice = alike = True
    if first is not None:  # on the last stage
        twice = torch.equal(first, again)
        alike = torch.equal(_of_the_replica_before(first, group), borrowed)
    answers = layout.gather((twice, alike, before, hardware.device_name()))
    makes = [make for *_, make in answers]
    unstable = [
        f"rank {rank} computes the same micro-batch in two ways"
        for rank, (twice, *_) in enumerate(answers)
        if not twice
    ]
    if unstable and not deterministic:
        return [
            f"guard.check_replicas: {', '.join(unstable[:SHOWN])}: a device is faulty, or an "
            "operation has no fixed order, which run.deterministic=true would exclude"
        ]
    found = unstable + [
        f"rank {before} and rank {rank} compute the same micro-batch differently"
        for rank, (_, alike, before, make) in enumerate(answers)
        if not alike and makes[before] == make
    ]
    _raise(found, since, "ranks do not compute the same")
    return []


def _of_the_replica_before(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What the replica before this one has in this place; the first one asks the last."""
    size, place = group.size(), group.rank()
    mine, received = tensor.contiguous(), torch.empty_like(tensor.contiguous())
    # Bools do not travel on every backend.
    sent, taken = (t.view(torch.uint8) if t.dtype == torch.bool else t for t in (mine, received))
    # As one operation: NCCL would begin a send of its own when the receive before it has ended,
    # and in a ring that is never.
    ring = [
        dist.P2POp(dist.irecv, taken, group=group, group_peer=(place - 1) % size),
        dist.P2POp(dist.isend, sent, group=group, group_peer=(place + 1) % size),
    ]
    for work in dist.batch_isend_irecv(ring):
        work.wait()
    return received


def _raise(found: list[str], since: int, what: str) -> None:
    """Raise when something was found, which is the same on every rank."""
    if found:
        raise MachineFailed(
            f"guard.check_replicas: {what}:\n  "
            + "\n  ".join(found[:SHOWN])
            + f"\nthey were the same at step {since}; leave out the machine of that rank, and go "
            "back to a checkpoint of that step or before with python -m pretrain rewind"
        )


def _differences(
    whose: str, group: dist.ProcessGroup, hashes: list[tuple[str, Tensor]]
) -> Iterator[str]:
    """A line for every tensor whose hash is not the same on all ranks of a group."""
    if group.size() == 1 or not hashes:
        return
    mine = torch.stack([value for _, value in hashes])
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    table = torch.stack(everyone).tolist()
    ranks = dist.get_process_group_ranks(group)
    for number, (name, _) in enumerate(hashes):
        values = [row[number] for row in table]
        (usual, count), *others = Counter(values).most_common()
        if not others:
            continue
        odd = [str(rank) for rank, value in zip(ranks, values, strict=True) if value != usual]
        if count == others[0][1]:  # nobody is in the majority
            odd = [str(rank) for rank in ranks]
        yield f"{name} between {whose}: rank {', '.join(odd)} of {', '.join(map(str, ranks))}"
