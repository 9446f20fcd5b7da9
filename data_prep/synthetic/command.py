"""The command `python -m data_prep synthetic TASK --out DIR`."""

import difflib

from data_prep.options import parse
from data_prep.synthetic.corpus import write_corpora
from data_prep.synthetic.expressions import ModArithmeticBrackets, SolveEquation
from data_prep.synthetic.images import Digits
from data_prep.synthetic.listops import ListOps
from data_prep.synthetic.prefixes import CycleNavigation, EvenPairs, ModArithmetic, Parity
from data_prep.synthetic.recall import MultiQueryRecall, NearestNeighbour
from data_prep.synthetic.strings import (
    BucketSort,
    Majority,
    MajorityCount,
    MissingDuplicate,
    OddsFirst,
    OrderedSet,
    Repetition,
    ReverseString,
    StackManipulation,
)
from data_prep.synthetic.task import Task
from xlstm_io.errors import PrepError

TASKS: dict[str, type[Task]] = {
    "parity": Parity,
    "even-pairs": EvenPairs,
    "cycle-nav": CycleNavigation,
    "mod-arith": ModArithmetic,
    "mod-arith-brackets": ModArithmeticBrackets,
    "solve-equation": SolveEquation,
    "reverse": ReverseString,
    "stack": StackManipulation,
    "bucket-sort": BucketSort,
    "missing-duplicate": MissingDuplicate,
    "odds-first": OddsFirst,
    "repetition": Repetition,
    "set": OrderedSet,
    "majority": Majority,
    "majority-count": MajorityCount,
    "mqar": MultiQueryRecall,
    "nearest": NearestNeighbour,
    "listops": ListOps,
    "digits": Digits,
}
"""All tasks by name; the first fifteen are the formal languages."""


def main(arguments: list[str], prog: str) -> None:
    """Run the command.

    Args:
        arguments: a task's name and its options.
        prog: how the command was called, for help.

    Raises:
        PrepError: no such task or option, or settings that cannot be kept.
    """
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_usage(prog))
        return
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1, cutoff=0.0)[0]
        raise PrepError(
            f"there is no task {name!r}; did you mean {near}? All tasks: {', '.join(TASKS)}"
        )
    write_corpora(name, parse(TASKS[name], arguments[1:], f"{prog} {name}"))


def _usage(prog: str) -> str:
    width = max(map(len, TASKS))
    lines = [
        f"  {name:{width}}  {(kind.__doc__ or '').splitlines()[0]}" for name, kind in TASKS.items()
    ]
    head = [
        f"usage: {prog} TASK --out DIR ...",
        f"       {prog} TASK --help    for a task's options",
        "",
    ]
    return "\n".join([*head, *lines])
