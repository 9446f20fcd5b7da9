"""Least time of one step of a recurrence, counted from a kernel's machine code.

It is a bound, not a measured time. A cell that feeds its output back cannot be faster than the
dependencies of one step allow. `step_walk` follows one warp alone through the code of a step, in
order. An instruction starts a cycle after the one before it, and not before its operands are there.
Where a step is a launch of its own, the code before its loop is a part of it. Latencies are the
smallest that have been published for A100 and H100. What other warps of the block do, bank
conflicts, replays and a busy memory only add to that.

`step_floor` compares it with the issue rate of the whole block and, for weights that are read again
at every step, with the widest path from the L2 cache to one processor.

Only NVIDIA's code is counted: there is no table of latencies for AMD's.
"""

import heapq
import re
from collections import Counter
from dataclasses import dataclass, field

from benchmarks.compiled.assembly import Instruction, Listing

# Cycles from issue to result, the smallest published; PRODUCT also from accumulator to accumulator.
ARITHMETIC, SPECIAL, PRODUCT, SHARED, BARRIER, L2 = 4, 18, 18, 23, 20, 200
L2_BYTES_PER_CYCLE = 64  # into one processor
WARMUP = 3  # turns of a loop before it is measured

NO_RESULT = (
    "STG", "STS", "STL", "STSM", "BAR", "BRA", "EXIT", "NOP", "LDGSTS", "LDGDEPBAR", "DEPBAR",
    "WARPSYNC", "CALL", "RET", "RED", "MEMBAR", "BSYNC", "BSSY", "YIELD",
)  # fmt: skip
REGISTER = re.compile(r"\b(U?R\d+|U?P\d)\b(\.64)?")


@dataclass
class Walk:
    """What a warp meets: cycles, instructions, and cycles spent waiting for each kind of result."""

    cycles: float = 0
    instructions: float = 0
    met: Counter = field(default_factory=Counter)  # instructions by kind
    waited: Counter = field(default_factory=Counter)  # cycles by kind

    def add(self, other: "Walk", times: float = 1) -> None:
        """Add `other` so many times."""
        self.cycles += times * other.cycles
        self.instructions += times * other.instructions
        for mine, more in ((self.met, other.met), (self.waited, other.waited)):
            for kind, count in more.items():
                mine[kind] += times * count


def kind_of(operation: str) -> tuple[str, int]:
    """What kind of instruction this is, and how long its result takes."""
    name = operation.split(".")[0]
    if name in ("HMMA", "IMMA", "DMMA"):
        return "products", PRODUCT
    if name == "MUFU":
        return "special", SPECIAL
    if name in ("LDS", "LDSM", "SHFL"):
        return "shared", SHARED
    if name in ("LDG", "LDGSTS", "LD"):
        return "global", L2
    if name == "BAR":
        return "barriers", BARRIER
    return "arithmetic", ARITHMETIC


def _registers(operand: str, count: int) -> list[str]:
    """Names of the registers that an operand stands for, `count` of them from the one it names."""
    names = []
    for name, double in REGISTER.findall(operand):
        prefix = name.rstrip("0123456789")
        first = int(name[len(prefix) :])
        wide = 1 if prefix.endswith("P") else max(count, 2 if double else 1)
        names += [f"{prefix}{first + i}" for i in range(wide)]
    return names


def operands_of(one: Instruction) -> tuple[list[str], list[str]]:
    """Registers that an instruction writes, and those that it reads."""
    parts = one.operation.split(".")
    name = parts[0]
    operands = [text.strip() for text in one.operands.split(",")] if one.operands.strip() else []
    wide = 4 if "128" in parts else 2 if "64" in parts or "WIDE" in parts else 1
    written = 0 if name in NO_RESULT or not operands else 1
    # Predicates beside the result: comparisons have two, sums with carry and others one.
    while 0 < written < len(operands) and re.fullmatch(r"U?P(\d|T)", operands[written]):
        written += 1
    if written == 1 and re.fullmatch(r"U?P\d", operands[0]) and name in ("LOP3", "SHFL"):
        written = 2
    if name == "HMMA":
        results, reads = 4, [4, 2, 4]
    elif name == "LDSM":
        results, reads = int(parts[-1]) if parts[-1] in ("2", "4") else 1, [1]
    elif name.startswith("ST"):
        results, reads = 0, [1, wide]
    else:
        results, reads = wide, [1, 1, wide if "WIDE" in parts else 1]
    writes = [r for text in operands[:written] for r in _registers(text, results)]
    sources = operands[written:]
    reads += [1] * (len(sources) - len(reads))
    read = [r for text, n in zip(sources, reads, strict=False) for r in _registers(text, n)]
    return writes, read + _registers(one.guard, 1)


def walk(path: list[Instruction], warmup: int = WARMUP) -> Walk:
    """One turn of a loop whose turns follow `path`, after `warmup` others; 0: from a cold start."""
    ready: dict[str, tuple[int, str]] = {}
    copies: list[int] = []  # when each closed group of asynchronous copies is there
    open_copy = now = start = 0
    for turn in range(warmup + 1):
        if turn == warmup:
            start, seen = now, Walk()
        for one in path:
            kind, latency = kind_of(one.operation)
            writes, reads = operands_of(one)
            due, cause = max((ready.get(r, (0, "")) for r in reads), default=(0, ""))
            if one.operation.startswith("LDGDEPBAR"):
                copies.append(open_copy)
            if one.operation.startswith("DEPBAR") and "SB0" in one.operands:
                left = int(one.operands.split(",")[1].strip().split()[0], 0)
                done = copies[: len(copies) - left]
                due, cause = max((due, cause), (max(done, default=0), "global"))
                copies = copies[len(copies) - left :] if left else []
            if turn == warmup:
                seen.instructions += 1
                seen.met[kind] += 1
                if due > now + 1:
                    seen.waited[cause] += due - (now + 1)
            now = max(now + 1, due)
            if one.operation.startswith("LDGSTS"):
                open_copy = now + L2
            if kind == "barriers":  # nothing after it starts before it is done
                now += BARRIER
                if turn == warmup:
                    seen.waited[kind] += BARRIER
            for register in writes:
                ready[register] = (now + latency, kind)
    seen.cycles = now - start
    return seen


def shortest_turn(
    listing: Listing, body: frozenset[int], avoid: frozenset[int] = frozenset()
) -> list[Instruction]:
    """Fewest instructions from the head of a loop back to it, around the loop `avoid`.

    Goes through that one too where there is no other way.
    """
    return _shortest_way(listing, listing.heads[body], listing.heads[body], body, avoid)


def way_in(listing: Listing, body: frozenset[int]) -> list[Instruction]:
    """Fewest instructions from the start of the kernel to the head of a loop."""
    everywhere = frozenset(range(len(listing.instructions)))
    head = listing.heads[body]
    return _shortest_way(listing, 0, head, everywhere) if head else []


def _shortest_way(
    listing: Listing,
    start: int,
    head: int,
    body: frozenset[int],
    avoid: frozenset[int] = frozenset(),
) -> list[Instruction]:
    """Fewest instructions from block `start` to `head` in `body`, around `avoid` if possible."""
    blocks, penalty = listing.blocks, len(listing.instructions)
    queue, best, via = [(0, start)], {start: 0}, {}
    back = (float("inf"), start)  # the cheapest way into the head, and its last block
    while queue:
        cost, block = heapq.heappop(queue)
        cost += blocks[block].end - block + penalty * (block in avoid)
        for after in blocks[block].successors:
            if after == head:
                back = min(back, (cost, block))
            elif after in body and cost < best.get(after, float("inf")):
                best[after], via[after] = cost, block
                heapq.heappush(queue, (cost, after))
    block, path = back[1], []
    while True:
        path = listing.instructions[block : blocks[block].end] + path
        if block == start:
            return path
        block = via[block]


def step_walk(
    listing: Listing, trips: tuple[int, ...], unrolled: int, launched: bool = False
) -> Walk:
    """One time step: a turn of the outermost loop that works, with those of the loops inside it.

    `trips` are the turns of these loops in the source, outermost first, `unrolled` how many turns
    of the innermost loop (of all) the assembler made into one. Turns that were moved out of a loop
    are on the way around it. `launched`: the step is a launch of its own, so that the way from the
    start of the kernel to its loop is a part of it.
    """
    nest = listing.working_nest()
    if not nest:
        return Walk()
    # A loop of a single turn may be gone.
    gone = len(trips) + 1 - len(nest)
    if gone < 0 or any(turns > 1 for turns in trips[:gone]):
        raise ValueError(f"{len(nest)} loops were found where the source has 1 + {len(trips)}")
    total = _walk_of(listing, nest, trips[gone:], unrolled)
    if launched:
        total.add(walk(way_in(listing, nest[0]), warmup=0))
    return total


def _walk_of(listing: Listing, nest: list, trips: tuple[int, ...], unrolled: int) -> Walk:
    """One turn of nest[0] as the source has it."""
    total = Walk()
    if len(nest) == 1:
        total.add(walk(shortest_turn(listing, nest[0])), 1 / unrolled)
        return total
    total.add(walk(shortest_turn(listing, nest[0], nest[1])))
    inner = _walk_of(listing, nest[1:], trips[1:], unrolled)
    outside = total.met["products"] / max(inner.met["products"], 1)
    total.add(inner, max(trips[0] - outside, 0))
    return total


def step_floor(walked: Walk, num_warps: int, step_bytes: int) -> dict[str, float]:
    """Cycles that one step takes at least, by what sets the limit: the largest is the floor."""
    return {
        "dependencies": walked.cycles,
        "issue": walked.instructions * num_warps / 4,  # four schedulers, one a cycle each
        "L2": step_bytes / L2_BYTES_PER_CYCLE,
    }
