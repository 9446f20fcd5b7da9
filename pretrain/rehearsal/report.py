"""The result of a rehearsal as text and as JSON."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pretrain.config import RunConfig, support
from pretrain.rehearsal.compare import groups_compared, unexpected_waits
from pretrain.rehearsal.gpus import RESERVE, Gpu
from pretrain.rehearsal.record import STEADY, Message, Mismatch, RankRecord

_SHOWN = 8  # mismatches in the text; the JSON has all
GB = 1e9


@dataclass
class Rehearsal:
    """What was rehearsed, and what came of it.

    Attributes:
        config: the run.
        world: its number of ranks.
        gpu: the device it is meant for; None where no one is named.
        records: of the rehearsed ranks, in their order.
        mismatches: in which they do not fit together.
    """

    config: RunConfig
    world: int
    gpu: Gpu | None
    records: list[RankRecord]
    mismatches: list[Mismatch] = field(default_factory=list)

    @property
    def too_large(self) -> list[RankRecord]:
        """The ranks whose peak and reserve do not fit the GPU."""
        if self.gpu is None:
            return []
        return [r for r in self.records if r.memory.peak + RESERVE > self.gpu.memory]

    def text(self) -> str:
        """The report that the command prints."""
        return "\n".join(
            (
                *self._header(),
                "",
                *_memory_table(self.records),
                *self._fit(),
                "",
                *_message_table(self.records[0]),
                "",
                *_waits(self.records),
                *self._verdict(),
            )
        )

    def as_json(self) -> dict[str, Any]:
        """Everything that was written down, stacks included."""
        return {
            "world": self.world,
            "gpu": None if self.gpu is None else asdict(self.gpu),
            "reserve": RESERVE,
            "ranks": [asdict(record) for record in self.records],
            "mismatches": [str(mismatch) for mismatch in self.mismatches],
        }

    def _header(self) -> Iterator[str]:
        layout = self.config.layout
        rehearsed, real = self.records[0].micro_batches
        check = ", the replica check" if self.config.guard.check_replicas else ""
        ranks = ", ".join(str(record.rank) for record in self.records)
        yield (
            f"rehearsed {len(self.records)} of {self.world} ranks: tensor {layout.tensor}, "
            f"pipeline {layout.pipeline}, virtual {layout.virtual}, context {layout.context}, "
            f"recompute {self.config.memory.recompute}"
        )
        if self.config.engine.name != "megatron":
            stage = support.zero_stage(self.config)
            yield f"engine {self.config.engine.name} with ZeRO stage {stage}"
        yield f"ranks {ranks}"
        yield (
            f"three steps of {rehearsed} micro-batches (a step of the run has {real}), evaluation"
            f"{check}, saving and loading"
        )

    def _fit(self) -> Iterator[str]:
        if self.gpu is None:
            return
        peak = max(record.memory.peak for record in self.records)
        free = self.gpu.memory - RESERVE - peak
        word = "fits" if free >= 0 else "DOES NOT FIT"
        yield (
            f"largest peak {peak / GB:.1f} GB + {RESERVE / GB:.0f} GB for driver, NCCL and gaps: "
            f"{word} {self.gpu.name} ({self.gpu.memory / GB:.0f} GB), {free / GB:+.1f} GB"
        )

    def _verdict(self) -> Iterator[str]:
        if not self.mismatches:
            count = groups_compared(self.records)
            yield f"{count} groups of several rehearsed ranks compared: no mismatch"
            return
        yield f"{len(self.mismatches)} mismatches:"
        for mismatch in self.mismatches[:_SHOWN]:
            yield str(mismatch)
        if len(self.mismatches) > _SHOWN:
            yield f"and {len(self.mismatches) - _SHOWN} more"


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of words in columns: the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *rest = (
            word.ljust(width) if number == 0 else word.rjust(width)
            for number, (word, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join((first, *rest)).rstrip()


def _memory_table(records: Sequence[RankRecord]) -> Iterator[str]:
    kinds: dict[str, None] = {}
    for record in records:
        kinds |= dict.fromkeys(record.memory.kinds)
    yield "peak memory in GB, by kind; place: in tensor, pipeline, context and data parallelism"
    rows = [["rank", "place", *kinds, "peak", "saves"]]
    for record in records:
        place = " ".join(f"{name[0]}{number}" for name, number in record.place.items())
        sizes = [record.memory.kinds.get(kind, 0) for kind in kinds]
        numbers = (f"{size / GB:.2f}" for size in (*sizes, record.memory.peak, record.saved_bytes))
        rows.append([str(record.rank), place, *numbers])
    yield from table(rows)


def messages_by_group(record: RankRecord, phase: str) -> dict[tuple[str, str], list[Message]]:
    """The messages of a phase by the group's description and the operation."""
    found: dict[tuple[str, str], list[Message]] = defaultdict(list)
    for message in record.messages:
        if message.phase == phase and len(message.members) > 1:
            found[message.group.partition(" ")[2], message.operation].append(message)
    return found


def _message_table(record: RankRecord) -> Iterator[str]:
    yield f"messages of a step on rank {record.rank}"
    rows = [["group", "operation", "ranks", "calls", "MB sent"]]
    for (group, operation), messages in messages_by_group(record, STEADY).items():
        sent = sum(message.wire_bytes() for message in messages)
        ranks = str(len(messages[0].members))
        rows.append([group, operation, ranks, str(len(messages)), f"{sent / 1e6:.2f}"])
    yield from table(rows)


def _waits(records: Sequence[RankRecord]) -> Iterator[str]:
    ranks: dict[tuple, list[int]] = defaultdict(list)
    times: Counter[tuple] = Counter()
    for record in records:
        for wait, count in unexpected_waits(record, STEADY):
            ranks[wait.what, wait.stack].append(record.rank)
            times[wait.what, wait.stack] = max(count, times[wait.what, wait.stack])
    operators = max(record.operators[STEADY] for record in records)
    yield f"{operators:,} operators on the device in a step"
    if not ranks:
        yield "the host waits for the device once in a step, for the verdict"
    for (what, stack), where in ranks.items():
        count = times[what, stack]
        often = "once" if count == 1 else f"{count} times"
        yield f"FINDING: the host waits for {what}, {often} a step"
        yield f"  on rank{'s' if len(where) > 1 else ''} {', '.join(map(str, where))}, asked by"
        yield from (f"    {frame}" for frame in stack)
