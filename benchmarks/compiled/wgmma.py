"""Looks in the assembly of a Hopper kernel for operands that are overwritten while they are read.

A tensor-core instruction of Hopper (HGMMA) is asynchronous: it reads its operands after later
instructions have begun. If its first operand lies in registers, nothing may write to them before
the wait that covers it. The ptxas of CUDA 12.8 and 12.9 is known to reuse such registers too early
(triton pull request 11781: 61 where 64 was right). Nothing reports that: the product is wrong.

`overwritten_operands` follows every path through the listing. What it does not find is not proved
to be right: it sees neither shared memory nor the accumulators.
"""

import re
from dataclasses import dataclass

from benchmarks.compiled.assembly import Instruction, Listing

OPERAND_REGISTERS = 4  # of a thread: 64 rows of 32 bytes in the registers of 128 threads
_OLDEST = 8  # groups that are counted apart; the hardware waits for at most 7 newer ones
_PLAIN = re.compile(r"^-?R(\d+)(?:\.\w+)*$")
_PREDICATE = re.compile(r"^!?U?P(?:\d|T)$")
# What writes no register, or reads the one that it names first.
_WRITES_NONE = {
    "BAR", "BRX", "CALL", "JMX", "NANOSLEEP", "R2P", "RET", "WARPSYNC", "FCHK", "HGMMA", "PLOP3",
}  # fmt: skip
_PRODUCT_RESULTS = {"HMMA": 4, "IMMA": 4, "DMMA": 4}


@dataclass(frozen=True)
class Overwritten:
    """One instruction that writes to an operand of a product that may still be running.

    Attributes:
        product: place of the HGMMA in the listing.
        writer: place of the instruction that writes.
        register: the first register that both name.
    """

    product: int
    writer: int
    register: int

    def describe(self, listing: Listing) -> str:
        """Both instructions as text."""
        writer, product = (listing.instructions[i] for i in (self.writer, self.product))
        return (
            f"`{writer.operation}{writer.operands}` ({self.writer}) writes R{self.register} of "
            f"`{product.operation}{product.operands}` ({self.product})"
        )


def register_operands(listing: Listing) -> dict[int, int]:
    """The HGMMA whose first operand lies in registers: place in the listing -> first register."""
    found = {}
    for one in listing.instructions:
        if one.operation.split(".")[0] == "HGMMA":
            register = _PLAIN.match(_operands(one)[1])
            if register:
                found[one.index] = int(register.group(1))
    return found


def overwritten_operands(listing: Listing, *, waits: bool = True) -> list[Overwritten]:
    """Writes to the register operands of products that no wait has covered, on any path.

    Args:
        listing: of a kernel for sm_90, in the dialect "sass".
        waits: whether waits count. Without them the search shows what it is able to find.
    """
    reads = register_operands(listing)
    found: set[Overwritten] = set()
    # Products that may be running at the start of a block -> the number of groups of products that
    # were closed after theirs, -1 for one whose own group is open. The smallest of all paths.
    entering: dict[int, dict[int, int]] = {start: {} for start in listing.blocks}
    changed = list(listing.blocks)
    while changed:
        start = changed.pop()
        block, running = listing.blocks[start], dict(entering[start])
        for one in listing.instructions[start : block.end]:
            _pass(one, running, reads, waits)
            for register in _written(one):
                for product in running:
                    if 0 <= register - reads[product] < OPERAND_REGISTERS:
                        found.add(Overwritten(product, one.index, register))
        for after in block.successors:
            known = entering[after]
            merged = {
                product: min(known.get(product, _OLDEST), running.get(product, _OLDEST))
                for product in known.keys() | running.keys()
            }
            if merged != known:
                entering[after] = merged
                changed.append(after)
    first = {}
    for one in sorted(found, key=lambda one: (one.product, one.writer, one.register)):
        first.setdefault((one.product, one.writer), one)
    return list(first.values())


def _pass(one: Instruction, running: dict[int, int], reads: dict[int, int], waits: bool) -> None:
    """What an instruction changes in the products that may be running."""
    if one.operation.startswith("HGMMA"):
        if one.index in reads:
            running[one.index] = -1
        if re.search(r"\bgsb0\b", one.operands):  # the last product of a group
            for product, age in running.items():
                running[product] = min(age + 1, _OLDEST)
    wait = re.search(r"gsb0, (0x[0-9a-f]+)", one.operands)
    if waits and wait and one.operation.startswith("WARPGROUP.DEPBAR") and not one.conditional:
        most = int(wait.group(1), 0)  # so many of the newest groups may go on
        for product in [product for product, age in running.items() if age >= most]:
            del running[product]


def _written(one: Instruction) -> range:
    """The registers that an instruction writes by itself, at once."""
    kind, *modifiers = one.operation.split(".")
    if kind in _WRITES_NONE or kind.endswith(("SETP", "SETP2")):
        return range(0)
    operands = _operands(one)
    while operands and _PREDICATE.match(operands[0]):  # SHFL, LOP3 and atomics may write one first
        operands.pop(0)
    register = _PLAIN.match(operands[0]) if operands else None
    if register is None:
        return range(0)
    first = int(register.group(1))
    return range(first, first + _width(kind, modifiers))


def _width(kind: str, modifiers: list[str]) -> int:
    """Registers of a thread that a result takes."""
    if kind in _PRODUCT_RESULTS:
        return _PRODUCT_RESULTS[kind]
    if kind == "LDSM":  # so many matrices, a register of each
        return next((int(m) for m in modifiers if m in ("2", "4")), 1)
    if "128" in modifiers:
        return 4
    double = kind in ("DADD", "DMUL", "DFMA", "LEPC") or (kind == "CS2R" and "32" not in modifiers)
    wide = {"64", "WIDE", "F64"} | ({"S64", "U64"} if kind == "F2I" else set())
    return 2 if double or wide & set(modifiers) else 1


def _operands(one: Instruction) -> list[str]:
    return [operand.strip() for operand in one.operands.split(",")]
