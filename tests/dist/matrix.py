"""Cells of the support matrix as cases for tests: how to start one, its name, which to take."""

import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any

from pretrain.config import support
from pretrain.config.support import Combination

LAYOUT_SIZES = {"tensor": 2, "pipeline": 2, "virtual": 2, "context": 2}
MOST_RANKS = 4


def replica_ranks(cell: Combination) -> int:
    """Processes of one replica, where every dimension of the layout has size 2."""
    sizes = [
        LAYOUT_SIZES[axis] for axis in ("tensor", "pipeline", "context") if getattr(cell, axis)
    ]
    product = 1
    for size in sizes:
        product *= size
    return product


def ranks_and_changes(cell: Combination) -> tuple[int, dict[str, Any]]:
    """(processes, changes to the configuration): two data-parallel replicas where 4 ranks do."""
    changes = {
        "engine__name": cell.engine,
        "engine__zero_stage": cell.zero_stage,
        "engine__offload": cell.offload,
        "engine__precision": cell.precision,
        "engine__grad_reduce": cell.grad_reduce,
        "engine__overlap_grad_reduce": cell.overlap_grad_reduce,
        "layout__sequence": cell.sequence,
        "optimizer__name": cell.optimizer,
    }
    changes |= {f"layout__{a}": size for a, size in LAYOUT_SIZES.items() if getattr(cell, a)}
    return min(MOST_RANKS, 2 * replica_ranks(cell)), changes


def name(cell: Combination) -> str:
    """A test's name."""
    words = [cell.engine, str(cell.zero_stage), cell.precision]
    words += [cell.optimizer] if cell.optimizer != "adamw" else []
    words += [f"reduced-in-{cell.grad_reduce}"] if cell.grad_reduce != "fp32" else []
    words += [cell.offload] if cell.offload != "none" else []
    words += [text for axis, text in support.LAYOUT_AXES.items() if getattr(cell, axis)]
    words += [text for axis, text in support.OVERLAP_AXES.items() if getattr(cell, axis)]
    return "-".join(words)


def covering(
    cells: Iterable[Combination], axes: Callable[[Combination], tuple], seed: int
) -> list[Combination]:
    """Of the cells in the seed's order, those that bring two values together for the first time.

    Args:
        cells: what to choose from.
        axes: the values of a cell that have to meet.
        seed: decides the order.
    """
    cells = list(cells)
    kept, met = [], set()
    for cell in random.Random(seed).sample(cells, len(cells)):
        pairs = set(itertools.combinations(enumerate(axes(cell)), 2))
        if not pairs <= met:
            kept.append(cell)
            met |= pairs
    return kept
