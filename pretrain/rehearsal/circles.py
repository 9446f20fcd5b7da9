"""Ranks that wait for each other: the messages of a rehearsal, played to their end as NCCL does.

What is modelled, as torch does it where a run does not name its device to `init_process_group`:

- A process group has a communicator for its collectives and batches, and for each two ranks one
  more for single messages between them. Each rank has one queue for each communicator. What it asks
  for starts when everything before it in this queue has ended.
- The first message of a communicator opens it: the rank goes on when all ranks of it have come.
- The messages of one batch (`batch_isend_irecv`) start together and end by themselves. What is
  behind them in the queue waits for all of them.
- A send and its receive end together, and a collective when all ranks of the group have come to it.
  Nothing is buffered, and tags mean nothing.
- What a rank asks for after `work.wait()` starts after that message, in every queue: the stream
  that computes waits, and a new message waits for this stream. Otherwise the queues of a rank do
  not wait for each other.
- Ranks that were not rehearsed are always ready. So a circle is found when all its ranks were.

What is not modelled: several streams that compute (here a wait holds back all of them, which is
later than on a device), small messages that a network buffers, groups of gloo (which start
everything at once), and the GPU's processors that messages of several groups have to share.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pretrain.rehearsal.record import Message, Mismatch, RankRecord

_TOLD = 4  # ranks of a circle whose stacks are told


def circles(records: Sequence[RankRecord]) -> list[Mismatch]:
    """Ranks that would hang, because each waits for the next one.

    Args:
        records: of the rehearsed ranks, whose messages fit together: each is sent and received, and
            all ranks of a group ask for the same collectives.
    """
    play = _Play(records)
    play.run()
    return [*play.stuck()]


@dataclass(eq=False, slots=True)
class _Item:
    """What stands in a queue: one message, or those of a batch.

    Attributes:
        rank: that asks for it.
        line: number of the communicator.
        open: numbers of the messages in it that have not ended.
    """

    rank: int
    line: int
    open: list[int]


class _Play:
    """Plays all ranks until no one can go on.

    Args:
        records: of the rehearsed ranks.
    """

    def __init__(self, records: Sequence[RankRecord]) -> None:
        self._messages = {record.rank: record.messages for record in records}
        self._lines: dict[tuple, int] = {}  # numbers of communicators
        self._ranks: list[set[int]] = []  # the rehearsed ranks of each
        self._joined: dict[int, set[int]] = defaultdict(set)  # those that have come to open it
        # What each rank does, last first: it puts an item into a queue, or waits for its end.
        self._ahead = {record.rank: [*self._course(record)][::-1] for record in records}
        self._queues: dict[tuple[int, int], deque[_Item]] = defaultdict(deque)
        self._heads: list[_Item] = []  # those that have come to the head of their queue
        self._awake = [*self._messages]  # ranks that may go on
        self._sides: dict[tuple, deque[tuple[_Item, int]]] = defaultdict(deque)
        self._arrived: dict[tuple, list[tuple[_Item, int]]] = defaultdict(list)
        self._collectives: Counter[tuple[int, int]] = Counter()

    def run(self) -> None:
        """Play to the end."""
        while self._awake or self._heads:
            if self._heads:
                item = self._heads.pop()
                for number in tuple(item.open):
                    self._meet(item, number)
                continue
            ahead = self._ahead[self._awake.pop()]
            while ahead:
                item, waits = ahead[-1]
                if item.open if waits else not self._is_open(item):
                    break
                ahead.pop()
                if not waits:
                    queue = self._queues[item.rank, item.line]
                    queue.append(item)
                    if len(queue) == 1:
                        self._heads.append(item)

    def stuck(self) -> Iterator[Mismatch]:
        """After `run`: every circle of items each of which waits for the next.

        Also messages for whose communicator another rank never comes.
        """
        starts = [queue[0] for queue in self._queues.values() if queue]
        starts += [ahead[-1][0] for ahead in self._ahead.values() if ahead and not ahead[-1][1]]
        seen: dict[_Item, int] = {}
        alone: set[tuple[int, int]] = set()
        for walk, item in enumerate(starts):
            path: list[tuple[_Item, int]] = []  # items, and which message is wanted of the next one
            while item not in seen:
                seen[item] = walk
                rank, wanted = self._missing(item)
                if wanted is None:
                    if (item.line, rank) not in alone:
                        yield self._told_alone(item, rank)
                    alone.add((item.line, rank))
                    break
                path.append((item, wanted))
                item = self._before(rank, wanted)
            else:
                if seen[item] == walk:
                    yield self._told(path[[one for one, _ in path].index(item) :])

    def _course(self, record: RankRecord) -> Iterator[tuple[_Item, bool]]:
        """What a rank does: items that it asks for, and items (True) whose end it waits for."""
        items: list[_Item] = []
        batches: dict[tuple[int, int], _Item] = {}
        ended = deque(record.ended)
        for number, message in enumerate(record.messages):
            while ended and ended[0][0] <= number:
                yield items[ended.popleft()[1]], True
            line = self._line(record.rank, message)
            item = _Item(record.rank, line, [number])
            if message.batch is not None:
                item = batches.setdefault((message.batch, line), item)
            items.append(item)
            if item.open[0] == number:
                yield item, False
            else:
                item.open.append(number)
        for _, number in ended:
            yield items[number], True

    def _line(self, rank: int, message: Message) -> int:
        """The number of a message's communicator."""
        peer, ranks = message.peer, message.members
        alone = peer is not None and message.batch is None
        if peer is not None and alone:
            ranks = min(rank, peer), max(rank, peer)
        key = message.group, ranks, alone
        if key not in self._lines:
            self._lines[key] = len(self._lines)
            self._ranks.append(self._messages.keys() & {*ranks})
        return self._lines[key]

    def _is_open(self, item: _Item) -> bool:
        """Whether the communicator of an item has all its ranks, now that this one is there."""
        joined, ranks = self._joined[item.line], self._ranks[item.line]
        if item.rank not in joined:
            joined.add(item.rank)
            if joined == ranks:
                self._awake += ranks
        return joined == ranks

    def _meet(self, item: _Item, number: int) -> None:
        """A message starts, and ends at once if all others that belong to it have started."""
        message, here = self._messages[item.rank][number], (item, number)
        if message.peer is None:
            self._collectives[item.rank, item.line] += 1
            key = item.line, self._collectives[item.rank, item.line]
            self._arrived[key].append(here)
            if len(self._arrived[key]) == len(self._ranks[item.line]):
                for one in self._arrived.pop(key):
                    self._end(*one)
        elif message.peer not in self._messages:
            self._end(*here)
        else:
            sends = message.operation == "send"
            pair = (item.rank, message.peer) if sends else (message.peer, item.rank)
            others = self._sides[item.line, pair, not sends]
            if others:
                self._end(*others.popleft())
                self._end(*here)
            else:
                self._sides[item.line, pair, sends].append(here)

    def _end(self, item: _Item, number: int) -> None:
        item.open.remove(number)
        if not item.open:
            queue = self._queues[item.rank, item.line]
            queue.popleft()
            if queue:
                self._heads.append(queue[0])
            self._awake.append(item.rank)

    def _missing(self, item: _Item) -> tuple[int, int | None]:
        """The rank that an item waits for, and the number of its message that is wanted, if any."""
        number = item.open[0]
        message, rank = self._messages[item.rank][number], item.rank
        absent = self._ranks[item.line] - self._joined[item.line]
        if absent:
            peer = min(absent)
            return peer, next(self._numbers(peer, item.line), None)
        place = sum(one < number for one in self._numbers(rank, item.line, message))
        if message.peer is None:
            key = item.line, self._collectives[rank, item.line]
            peer = min(self._ranks[item.line] - {one.rank for one, _ in self._arrived[key]})
            theirs = [*self._numbers(peer, item.line, message)]
        else:
            peer = message.peer
            theirs = [
                one
                for one in self._numbers(peer, item.line)
                if self._messages[peer][one].peer == rank
                and self._messages[peer][one].operation != message.operation
            ]
        return peer, theirs[place] if place < len(theirs) else None

    def _numbers(self, rank: int, line: int, like: Message | None = None) -> Iterator[int]:
        """Numbers of a rank's messages of a communicator, or those with the same other side."""
        for number, one in enumerate(self._messages[rank]):
            if self._line(rank, one) == line and (
                like is None
                or (one.peer == like.peer and (one.peer is None or one.operation == like.operation))
            ):
                yield number

    def _before(self, rank: int, number: int) -> _Item:
        """What holds back a message of a rank: the head of its queue, or what the rank is at."""
        queue = self._queues[rank, self._line(rank, self._messages[rank][number])]
        if any(number in item.open for item in queue):
            return queue[0]
        item, waits = self._ahead[rank][-1]
        return self._queues[rank, item.line][0] if waits else item

    def _told(self, circle: list[tuple[_Item, int]]) -> Mismatch:
        ranks = [item.rank for item, _ in circle]
        first = ranks.index(min(ranks))
        circle = circle[first:] + circle[:first]
        details: list[str] = []
        # Each item holds back what the one before it in the circle waits for.
        for place, (item, _) in enumerate(circle[:_TOLD]):
            held = self._messages[item.rank][circle[place - 1][1]]
            details += [
                *self._asked(item),
                f"    before it comes to its {held.describe()} in group {held.group}, asked for by",
                *(f"    {frame}" for frame in held.stack[-1:]),
            ]
        if len(circle) > _TOLD:
            details.append(f"  and {len(circle) - _TOLD} more")
        who = ", ".join(map(str, sorted({*ranks})))
        return Mismatch(f"ranks {who} would hang: they wait for each other", tuple(details))

    def _told_alone(self, item: _Item, peer: int) -> Mismatch:
        return Mismatch(
            f"rank {item.rank} would hang: rank {peer} does not come to the same communicator",
            tuple(self._asked(item)),
        )

    def _asked(self, item: _Item) -> Iterator[str]:
        message = self._messages[item.rank][item.open[0]]
        way = "" if message.batch is None else " in a batch"
        yield f"  rank {item.rank}: {message.describe()} in group {message.group}{way}"
        yield from (f"    {frame}" for frame in message.stack)
