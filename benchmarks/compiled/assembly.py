"""Reads the assembly of a compiled kernel: its loops, and what an iteration of each does.

Works on the text of `nvdisasm -c` (dialect "sass"), on `amdgcn` ("amd") and on PTX ("ptx", to tell
how often the assembler unrolled a loop). Loops are natural loops of the control flow graph: an edge
goes back only if its target dominates its source, so code that the compiler moved out of line does
not count as a loop.
"""

import re
from collections import Counter
from dataclasses import dataclass

LABEL = re.compile(r"^([.$]L\w+):")
SASS_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?\w+\s+)?([A-Z][A-Z0-9_.x]*)([^;]*);")
PTX_LINE = re.compile(r"^(@!?%\w+\s+)?([a-z][a-z0-9_]*(?:[.:]+\w+)*)\s*([^;]*);")
AMD_LINE = re.compile(r"^()((?:s|v|ds|global|flat|buffer|scratch)_\w+)\s*([^;]*)")
SASS_TENSOR = ("HMMA", "HGMMA", "UTCHMMA", "UTCMMA", "UTCQMMA", "IMMA", "DMMA")
AMD_WIDTHS = {"x4": 16, "x3": 12, "x2": 8, "dword": 4, "short": 2, "byte": 1}


@dataclass(frozen=True)
class Instruction:
    """One instruction: place in the listing, operation, operands, whether it is predicated."""

    index: int
    operation: str
    operands: str
    conditional: bool
    guard: str = ""  # its predicate


@dataclass(frozen=True)
class Block:
    """Instructions that run one after the other: the end of their numbers, what may follow."""

    end: int
    successors: frozenset[int]  # first instructions of blocks


@dataclass(frozen=True)
class LoopCount:
    """What one iteration of a loop does, for each thread of the block unless said otherwise."""

    instructions: int
    tensor: int  # tensor-core instructions, per warp
    async_copies: int  # copies from global to shared memory that do not wait
    async_bytes: int
    loads: int  # ordinary loads from global memory
    load_bytes: int
    barriers: int
    full_waits: int  # waits until every copy, or every tensor-core instruction, is done
    special: int  # exp2, log2, reciprocal, tanh, ...
    chain: int = 0  # longest run of tensor-core instructions that wait for one another
    flight: int = 0  # most bytes that were asked for and not yet waited for, at any place


class Listing:
    """Instructions of one kernel with their labels; see the module."""

    def __init__(self, text: str, dialect: str):
        self.dialect = dialect
        pattern = {"sass": SASS_LINE, "ptx": PTX_LINE, "amd": AMD_LINE}[dialect]
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := LABEL.match(line.strip()):
                self.labels[label.group(1)] = len(self.instructions)
            elif found := pattern.search(line.strip()):
                predicate, operation, operands = found.groups()
                conditional = bool(predicate) or operation.startswith("s_cbranch")
                number = len(self.instructions)
                one = Instruction(number, operation, operands, conditional, predicate or "")
                self.instructions.append(one)
        self.blocks: dict[int, Block] = {}  # by first instruction
        self.heads: dict[frozenset[int], int] = {}  # of loops
        self.loops = self._find_loops()

    # control flow

    def _target(self, instruction: Instruction) -> int | None:
        """Where a branch goes; None for anything else."""
        kind = instruction.operation.split(".")[0]
        # ptxas leaves some loops by a CALL to a label, which never returns.
        if kind not in ("BRA", "CALL", "bra") and not kind.startswith(("s_branch", "s_cbranch")):
            return None
        name = re.search(r"[.$]L\w+", instruction.operands)
        return self.labels.get(name.group()) if name else None

    def _find_loops(self) -> list[frozenset[int]]:
        """Natural loops as sets of instruction numbers, one for each head."""
        count = len(self.instructions)
        starts = {0, *self.labels.values()}
        for one in self.instructions:
            if self._target(one) is not None or self._ends(one):
                starts.add(one.index + 1)
        heads = sorted(start for start in starts if start < count)
        block_of = {head: number for number, head in enumerate(heads)}
        ends = [*heads[1:], count]
        successors: list[set[int]] = []
        for end in ends:
            last = self.instructions[end - 1]
            target = self._target(last)
            after = set()
            if target is not None and target in block_of:
                after.add(block_of[target])
            falls = not self._ends(last) and (target is None or self._may_fall(last))
            if falls and end < count:
                after.add(block_of[end])
            successors.append(after)
        bodies: dict[int, set[int]] = {}
        for source, head in self._back_edges(successors):
            bodies.setdefault(head, set()).update(self._body(source, head, successors))
        self.blocks = {
            heads[i]: Block(ends[i], frozenset(heads[j] for j in successors[i]))
            for i in range(len(heads))
        }
        self.heads = {
            frozenset(i for block in body for i in range(heads[block], ends[block])): heads[head]
            for head, body in bodies.items()
        }
        return list(self.heads)

    def _ends(self, one: Instruction) -> bool:
        """Whether the program ends here whatever the predicate."""
        return one.operation in ("s_endpgm", "EXIT", "ret") and not one.conditional

    def _may_fall(self, branch: Instruction) -> bool:
        """Whether a branch is conditional: predicated, or with a predicate among its operands."""
        return branch.conditional or bool(re.match(r"\s*!?U?P\d", branch.operands))

    @staticmethod
    def _back_edges(successors: list[set[int]]) -> list[tuple[int, int]]:
        """Edges whose target dominates their source, among the blocks that can be reached."""
        reached, stack = {0}, [0]
        while stack:
            for after in successors[stack.pop()] - reached:
                reached.add(after)
                stack.append(after)
        before: dict[int, set[int]] = {block: set() for block in reached}
        for block in reached:
            for after in successors[block]:
                before[after].add(block)
        dominators = {block: set(reached) for block in reached} | {0: {0}}
        changed = True
        while changed:
            changed = False
            for block in sorted(reached - {0}):
                new = set.intersection(*(dominators[b] for b in before[block])) | {block}
                changed |= new != dominators[block]
                dominators[block] = new
        return [(b, after) for b in reached for after in successors[b] if after in dominators[b]]

    @staticmethod
    def _body(source: int, head: int, successors: list[set[int]]) -> set[int]:
        """Blocks of the natural loop of a back edge."""
        body, stack = {head, source}, [source]
        while stack:
            block = stack.pop()
            if block == head:
                continue
            for other, after in enumerate(successors):
                if block in after and other not in body:
                    body.add(other)
                    stack.append(other)
        return body

    # counting

    def main_loops(self, *, outermost: bool = False) -> list[LoopCount]:
        """The loops that do the work, the one with most tensor-core instructions first.

        These are the innermost loops with tensor-core instructions, or with loads from global
        memory where there are none. `outermost` asks for the loops around them: time steps.
        """
        counted = [(body, self.count(body)) for body in self.loops]
        working = [(body, c) for body, c in counted if c.tensor]
        working = working or [(b, c) for b, c in counted if c.loads + c.async_copies]
        chosen = [
            c
            for body, c in working
            if not any((body < other) if outermost else (other < body) for other, _ in working)
        ]
        return sorted(chosen, key=lambda c: (-c.tensor, -c.load_bytes - c.async_bytes))

    def working_nest(self) -> list[frozenset[int]]:
        """Loops with tensor-core instructions, each inside the one before it, outermost first.

        Where several are side by side, the one with most of these instructions.
        """
        nest: list[frozenset[int]] = []
        while True:
            inside = [x for x in self.loops if self.count(x).tensor and (not nest or x < nest[-1])]
            outer = [x for x in inside if not any(x < other for other in inside)]
            if not outer:
                return nest
            nest.append(max(outer, key=lambda x: self.count(x).tensor))

    def count(self, body: frozenset[int] | None = None) -> LoopCount:
        """Counts over the instructions of `body`, or over the whole kernel."""
        chosen = self.instructions if body is None else [self.instructions[i] for i in sorted(body)]
        total: Counter[str] = Counter(instructions=len(chosen))
        for one in chosen:
            total.update(self.count_one(one))
        total["chain"] = self._tensor_chain(chosen)
        total["flight"] = self._most_in_flight(chosen)
        fields = LoopCount.__dataclass_fields__
        return LoopCount(**{name: total.get(name, 0) for name in fields})

    def _tensor_chain(self, chosen: list[Instruction]) -> int:
        """Longest chain of tensor-core instructions through their accumulators, in listing order.

        The accumulator is the first register operand (the result) and the last one (the addend).
        """
        depth: dict[str, int] = {}
        for one in chosen:
            if self.count_one(one).get("tensor"):
                registers = re.findall(r"\b[RVvat]\w*(?:\[[^]]*\])?", one.operands)
                if registers:
                    depth[registers[0]] = depth.get(registers[-1], 0) + 1
        return max(depth.values(), default=0)

    def _most_in_flight(self, chosen: list[Instruction]) -> int:
        """Most bytes under way while the loop runs round and round: copies queue up in groups.

        A wait names how many of the newest groups may stay under way. On NVIDIA copies to shared
        memory are closed into groups by LDGDEPBAR; on AMD every load is a group of its own.
        """
        queue: list[int] = []
        open_group = most = 0
        for one in chosen * 3:
            counted = self.count_one(one)
            size = counted.get("async_bytes", 0)
            if self.dialect == "amd":
                if size := size + counted.get("load_bytes", 0):
                    queue.append(size)
                wait = re.search(r"vmcnt\((\d+)\)", one.operands)
                wait = wait and wait.group(1)
            else:
                open_group += size
                if one.operation == "LDGDEPBAR":
                    queue.append(open_group)
                    open_group = 0
                wait = re.search(r"SB0, (0x[0-9a-f]+)", one.operands)
                wait = wait and one.operation.startswith("DEPBAR") and wait.group(1)
            if wait:
                queue = queue[max(len(queue) - int(wait, 0), 0) :]
            most = max(most, sum(queue) + open_group)
        return most

    def count_one(self, one: Instruction) -> dict[str, int]:
        """What a single instruction adds to a `LoopCount`."""
        return getattr(self, f"_{self.dialect}")(one)

    def local_bytes(self) -> tuple[int, int]:
        """Bytes per thread of spill stores and loads: SASS accesses to local memory."""
        sizes = Counter()
        for one in self.instructions:
            name = one.operation.split(".")[0]
            if name in ("STL", "LDL"):
                sizes[name] += _sass_width(one.operation)
        return sizes["STL"], sizes["LDL"]

    def tensor_names(self) -> dict[str, int]:
        """How many tensor-core instructions of each kind the kernel has."""
        if self.dialect == "amd":
            names = [i.operation for i in self.instructions if i.operation.startswith("v_mfma")]
        else:
            kinds = (i.operation.split(".") for i in self.instructions)
            names = [".".join(k[:2]) for k in kinds if k[0] in SASS_TENSOR]
        return dict(Counter(names))

    @staticmethod
    def _sass(one: Instruction) -> dict[str, int]:
        parts = one.operation.split(".")
        kind = parts[0]
        if kind in SASS_TENSOR:
            return {"tensor": 1}
        if kind == "LDGSTS":
            return {"async_copies": 1, "async_bytes": _sass_width(one.operation)}
        if kind == "UTMALDG":  # its size stands in a descriptor, not in the instruction
            return {"async_copies": 1}
        if kind == "LDG":
            return {"loads": 1, "load_bytes": _sass_width(one.operation)}
        if kind == "BAR" and "SYNC" in parts:
            return {"barriers": 1}
        if "DEPBAR" in parts[:2] and re.search(r"(SB0|gsb0), 0x0\b", one.operands):
            return {"full_waits": 1}
        if kind == "SYNCS" and "TRYWAIT" in parts:
            return {"full_waits": 1}
        return {"special": 1} if kind == "MUFU" else {}

    @staticmethod
    def _ptx(one: Instruction) -> dict[str, int]:
        if one.operation.startswith(("mma.sync", "wgmma.mma_async", "tcgen05.mma")):
            return {"tensor": 1}
        return {"barriers": 1} if one.operation.startswith(("bar", "barrier")) else {}

    @staticmethod
    def _amd(one: Instruction) -> dict[str, int]:
        name = one.operation
        if name.startswith("v_mfma"):
            return {"tensor": 1}
        if name.startswith(("global_load", "buffer_load")):
            width = next((size for part, size in AMD_WIDTHS.items() if part in name), 4)
            if "lds" in name or " lds" in one.operands:
                return {"async_copies": 1, "async_bytes": width}
            return {"loads": 1, "load_bytes": width}
        if name == "s_barrier":
            return {"barriers": 1}
        if name == "s_waitcnt" and "vmcnt(0)" in one.operands:
            return {"full_waits": 1}
        special = ("v_exp", "v_log", "v_rcp", "v_rsq", "v_sqrt")
        return {"special": 1} if name.startswith(special) else {}


def _sass_width(operation: str) -> int:
    """Bytes that a memory instruction moves for each thread."""
    parts = operation.split(".")
    for part, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if part in parts:
            return size
    return 4
