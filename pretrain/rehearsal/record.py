"""What one rank did in a rehearsal: messages, waits, memory; plain and picklable."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

# Frames of these packages and files say nothing about who asked for a message.
_FOREIGN = (
    "torch",
    "contextlib.py",
    "functools.py",
    "megatron/first_import.py",
    "pretrain/__main__.py",
    "pretrain/cli.py",
    "pretrain/commands/before_run/rehearse.py",
)
_PACKAGES = Path(__file__).parents[2]
_OWN = str(Path(__file__).parent)
_DEPTH = 12  # frames kept of a stack

# The phase whose step is like every later one of a run.
STEADY = "step 2"

Stack = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Message:
    """One collective, or one message between two ranks.

    Attributes:
        operation: such as "all_reduce" or "send".
        group: torch's name of the process group, the same on every rank, and its description.
        members: global ranks of the group.
        dtype: of its tensors.
        bytes: of its tensors on this rank; of gathered and scattered ones the whole.
        peer: global rank of the other side of a "send" or "receive"; None for collectives.
        detail: what else must agree, such as the root of a broadcast.
        phase: part of the rehearsal, such as "step 2".
        stack: who asked for it, innermost last.
        batch: number of the batch whose messages start together; None for a message by itself.
    """

    operation: str
    group: str
    members: tuple[int, ...]
    dtype: str
    bytes: int
    peer: int | None
    detail: str
    phase: str
    stack: Stack
    batch: int | None = None

    def describe(self) -> str:
        """The message in one line, without its stack."""
        to = "" if self.peer is None else f" with rank {self.peer}"
        about = f", {self.detail}" if self.detail else ""
        return f"{self.operation} of {self.bytes:,} bytes {self.dtype}{to}{about} in {self.phase}"

    def wire_bytes(self) -> float:
        """Bytes that this rank sends, with the algorithms that need the fewest.

        A ring all-reduce sends 2 (n - 1) / n of its tensor, one half of it for a gather or scatter.
        """
        ranks = len(self.members)
        if self.operation == "receive" or ranks < 2:
            return 0.0
        if self.operation == "send":
            return float(self.bytes)
        rounds = 2 if self.operation.startswith("all_reduce") else 1
        return rounds * self.bytes * (ranks - 1) / ranks


@dataclass(frozen=True)
class Mismatch:
    """Ranks that do not agree.

    Attributes:
        summary: what, in one line.
        details: what each of them does and who asked for it.
    """

    summary: str
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join((self.summary, *self.details))


@dataclass(frozen=True)
class HostWait:
    """A place where the host waits for the device.

    Attributes:
        phase: part of the rehearsal.
        what: what the host asked for.
        stack: who asked, innermost last.
    """

    phase: str
    what: str
    stack: Stack


@dataclass
class Memory:
    """Device memory of one rank, in bytes.

    Attributes:
        peak: the most that was there at once, over the steps.
        kinds: what was there at that moment, by kind.
        held: what stays between steps, by kind.
    """

    peak: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SavedSlice:
    """A slice that a rank saves: name, global shape, offset and shape."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass
class RankRecord:
    """All that was seen of one rank.

    Attributes:
        rank: its global rank.
        place: its rank in each dimension of the layout.
        messages: in the order in which they were asked for.
        ended: messages whose end was waited for, in this order: how many messages had been asked
            for by then, and which one. What is asked for later starts after it.
        waits: of the host for the device.
        memory: of the device.
        operators: operators that start work on the device, by phase.
        saved: the slices of the checkpoint that this rank writes.
        saved_bytes: their size, which a save copies into host memory.
        micro_batches: how many of them a rehearsed step had, and a real one.
        seconds: how long the rehearsal of this rank took.
    """

    rank: int
    place: dict[str, int] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    ended: list[tuple[int, int]] = field(default_factory=list)
    waits: list[HostWait] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    operators: dict[str, int] = field(default_factory=dict)
    saved: list[SavedSlice] = field(default_factory=list)
    saved_bytes: int = 0
    micro_batches: tuple[int, int] = (0, 0)
    seconds: float = 0.0


def caller_stack() -> Stack:
    """Who called, outside torch and this package: `file:line function`, innermost last."""
    frames: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(frames) < _DEPTH:
        path = frame.f_code.co_filename
        inner = path.rpartition("site-packages/")[2]
        foreign = inner.startswith(("torch/", "<")) or path.endswith(_FOREIGN)
        if not foreign and not path.startswith(_OWN):
            name = inner if inner != path else path.removeprefix(f"{_PACKAGES}/")
            frames.append(f"{name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return tuple(reversed(frames))
