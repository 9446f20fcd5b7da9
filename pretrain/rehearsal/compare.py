"""Holding the records of several ranks against each other: what would hang, or mix up data."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from pretrain.rehearsal.circles import circles
from pretrain.rehearsal.record import HostWait, Message, Mismatch, RankRecord
from xlstm_io.errors import CheckpointError

POINT_TO_POINT = ("send", "receive")
# Waits that every step has: the trainer reads the verdict once.
_EXPECTED = "pretrain/engines/verdict.py"


def compare_ranks(records: Sequence[RankRecord]) -> list[Mismatch]:
    """Everything in which the rehearsed ranks do not fit together.

    In each group all ranks must ask for the same collectives in the same order with the same sizes,
    each message that is sent must be received, two groups that share ranks must be used in the same
    order by all of these, and no ranks may wait for each other.

    Args:
        records: of the rehearsed ranks, at least one.
    """
    found = [*_collectives(records), *_point_to_point(records)]
    # Where a collective is missing the order differs as well, and says nothing new. Both make
    # ranks wait for each other.
    return found or [*_order_of_groups(records)] or circles(records)


def groups_compared(records: Sequence[RankRecord]) -> int:
    """The number of groups in which at least two of the ranks were compared."""
    return sum(len(by_rank) > 1 for by_rank in _by_group(records).values())


def compare_saved(records: Sequence[RankRecord], complete: bool) -> list[Mismatch]:
    """Check that the slices of the checkpoint do not overlap and leave nothing out.

    Args:
        records: of the rehearsed ranks.
        complete: whether these are all ranks; otherwise only overlaps can be found.
    """
    from xlstm_io.checkpoint.reader import check_exact_cover  # needs torch

    shapes: dict[str, tuple[int, ...]] = {}
    slices: dict[str, list] = defaultdict(list)
    found: list[Mismatch] = []
    for record in records:
        for part in record.saved:
            if shapes.setdefault(part.name, part.global_shape) != part.global_shape:
                found.append(Mismatch(f"{part.name} has two shapes, one of rank {record.rank}"))
            slices[part.name].append((part.offset, part.shape, record.rank))
    for name, shape in shapes.items():
        try:
            check_exact_cover(name, shape, slices[name])
        except CheckpointError as error:
            if complete or "overlaps" in str(error) or "does not lie in" in str(error):
                found.append(Mismatch(f"checkpoint: {error}"))
    return found


def unexpected_waits(record: RankRecord, phase: str) -> list[tuple[HostWait, int]]:
    """Places of a step where the host waits for the device, beyond the one of the verdict.

    Returns:
        Each place with how often the host waits there.
    """
    waits = Counter(wait for wait in record.waits if wait.phase == phase)
    return [
        (wait, count)
        for wait, count in waits.items()
        if not (wait.stack and wait.stack[-1].startswith(_EXPECTED))
    ]


def _by_group(records: Sequence[RankRecord]) -> dict[tuple, dict[int, list[Message]]]:
    """Messages of each rehearsed member of each group; none for one that asked for none."""
    rehearsed = [record.rank for record in records]
    groups: dict[tuple, dict[int, list[Message]]] = {}
    for record in records:
        for message in record.messages:
            key = message.group, message.members
            if key not in groups:
                groups[key] = {rank: [] for rank in rehearsed if rank in message.members}
            groups[key].setdefault(record.rank, []).append(message)
    return groups


def _same(message: Message) -> tuple:
    return message.phase, message.operation, message.dtype, message.bytes, message.detail


def _collectives(records: Sequence[RankRecord]) -> Iterator[Mismatch]:
    for (group, members), by_rank in _by_group(records).items():
        sequences = {
            rank: [m for m in messages if m.operation not in POINT_TO_POINT]
            for rank, messages in by_rank.items()
        }
        first, *others = sorted(sequences)
        for other in others:
            here, there = sequences[first], sequences[other]
            place = _first_difference([*map(_same, here)], [*map(_same, there)])
            if place is not None:
                yield Mismatch(
                    f"group {group} of {len(members)} ranks: rank {first} and rank {other} differ "
                    f"at collective {place + 1} of it",
                    (*_told(first, here, place), *_told(other, there, place)),
                )


def _point_to_point(records: Sequence[RankRecord]) -> Iterator[Mismatch]:
    for (group, _), by_rank in _by_group(records).items():
        for source in by_rank:
            for target in by_rank:
                sent = _between(by_rank[source], "send", target)
                received = _between(by_rank[target], "receive", source)
                sizes = [[(m.phase, m.dtype, m.bytes) for m in side] for side in (sent, received)]
                place = _first_difference(*sizes)
                if place is not None:
                    yield Mismatch(
                        f"group {group}: message {place + 1} from rank {source} to rank {target} "
                        "is not sent and received alike",
                        (*_told(source, sent, place), *_told(target, received, place)),
                    )


def _between(messages: list[Message], operation: str, peer: int) -> list[Message]:
    return [m for m in messages if m.operation == operation and m.peer == peer]


def _order_of_groups(records: Sequence[RankRecord]) -> Iterator[Mismatch]:
    """Pairs of ranks that use the groups of both in different order.

    Most pairs share the same few sets of groups, so what a rank does in a set is written out once.
    """
    groups: dict[tuple, int] = {}  # group and members -> number
    calls: dict[tuple, int] = {}  # what must agree of a message -> number
    courses = [
        [
            (groups.setdefault((m.group, m.members), len(groups)), m)
            for m in record.messages
            if m.operation not in POINT_TO_POINT
        ]
        for record in records
    ]
    members = [frozenset(of) for _, of in groups]
    own = [{group for group, _ in course} for course in courses]
    kept: dict[tuple[int, frozenset[int]], tuple[int, ...]] = {}
    alike: dict[tuple[int, ...], tuple[int, ...]] = {}  # one object for equal ones

    def course_in(place: int, shared: frozenset[int]) -> tuple[int, ...]:
        if (place, shared) not in kept:
            course = tuple(
                calls.setdefault((group, *_same(m)), len(calls))
                for group, m in courses[place]
                if group in shared
            )
            kept[place, shared] = alike.setdefault(course, course)
        return kept[place, shared]

    for first, one in enumerate(records):
        for second, other in enumerate(records[first + 1 :], first + 1):
            both = {one.rank, other.rank}
            shared = frozenset(g for g in own[first] | own[second] if both <= members[g])
            here, there = course_in(first, shared), course_in(second, shared)
            if here is there:
                continue
            place = _first_difference([*here], [*there])
            assert place is not None
            told = [[m for g, m in courses[n] if g in shared] for n in (first, second)]
            yield Mismatch(
                f"rank {one.rank} and rank {other.rank} use their groups in different order",
                (*_told(one.rank, told[0], place), *_told(other.rank, told[1], place)),
            )


def _first_difference(one: list, other: list) -> int | None:
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return None if len(one) == len(other) else min(len(one), len(other))


def _told(rank: int, messages: list[Message], place: int) -> Iterator[str]:
    """What a rank does at a place of its sequence, and who asked for it."""
    if place >= len(messages):
        yield f"  rank {rank}: nothing more after {len(messages)}"
        return
    yield f"  rank {rank}: {messages[place].describe()} in group {messages[place].group}"
    yield from (f"    {frame}" for frame in messages[place].stack)
