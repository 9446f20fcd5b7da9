"""Which combinations of engine, ZeRO stage, offload, precision and layout work: as data, once.

The rules below say what does *not* work and why; everything else does. Of that,
tests/dist/test_engines.py compares with one process a sample in which every two values of its axes
meet. The configuration's checks take their messages from here, and ARCHITECTURE.md its table
(:func:`markdown_table`).

Nothing here imports torch.
"""

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Combination:
    """One cell of the support matrix. Layout entries say whether a dimension is larger than 1."""

    engine: str = "megatron"
    optimizer: str = "adamw"
    zero_stage: int = 1
    offload: str = "none"
    precision: str = "fp32"
    tensor: bool = False
    sequence: bool = False
    pipeline: bool = False
    virtual: bool = False
    context: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    tp_comm_overlap: bool = False

    @classmethod
    def of(cls, config: Any) -> "Combination":
        """The combination that a run's configuration asks for."""
        engine, layout = config.engine, config.layout
        return cls(
            engine=engine.name,
            optimizer=config.optimizer.name,
            zero_stage=engine.zero_stage,
            offload=engine.offload,
            precision=engine.precision,
            tensor=layout.tensor > 1,
            sequence=layout.sequence,
            pipeline=layout.pipeline > 1,
            virtual=layout.virtual > 1,
            context=layout.context > 1,
            # Null is decided by engine and device, within the matrix: see `overlaps`.
            overlap_grad_reduce=engine.overlap_grad_reduce is True,
            overlap_param_gather=engine.overlap_param_gather is True,
            tp_comm_overlap=engine.tp_comm_overlap,
        )


# What each axis can be, and how much a user minds changing it when another value is proposed.
AXES: dict[str, tuple[tuple[Any, ...], int]] = {
    "engine": (("megatron", "deepspeed"), 1),
    "optimizer": (("adamw", "muon"), 6),
    "zero_stage": ((0, 1, 2, 3), 2),
    "offload": (("none", "optimizer", "parameters"), 3),
    "precision": (("fp32", "bf16", "fp8"), 20),
    "tensor": ((False, True), 10),
    "sequence": ((False, True), 9),
    "pipeline": ((False, True), 8),
    "virtual": ((False, True), 5),
    "context": ((False, True), 10),
    "overlap_grad_reduce": ((False, True), 0),
    "overlap_param_gather": ((False, True), 1),
    "tp_comm_overlap": ((False, True), 0),
}


@dataclass(frozen=True)
class Rule:
    """Combinations that do not work.

    Attributes:
        when: values of axes, all of which a combination must have to fall under the rule.
        reason: why it does not work, as the rest of a sentence.
    """

    when: dict[str, tuple[Any, ...]]
    reason: str

    def applies(self, cell: Combination) -> bool:
        """Whether ``cell`` falls under this rule."""
        return all(getattr(cell, axis) in values for axis, values in self.when.items())


RULES: tuple[Rule, ...] = (
    Rule(
        {"precision": ("fp8",)},
        "fp8 needs TransformerEngine's linear layers, and the blocks are built from Megatron's own",
    ),
    Rule(
        {"optimizer": ("muon",), "engine": ("deepspeed",)},
        "Muon needs whole matrices, and DeepSpeed's partitions cut them",
    ),
    Rule(
        {"optimizer": ("muon",), "tensor": (True,)},
        "every rank would orthogonalise its shard of a matrix, which is not the update of one "
        "process",
    ),
    Rule(
        {"optimizer": ("muon",), "zero_stage": (1, 2, 3)},
        "Muon orthogonalises whole matrices, so its state is not shared out over data parallel "
        "processes",
    ),
    Rule(
        {"engine": ("megatron",), "optimizer": ("adamw",), "zero_stage": (0, 2, 3)},
        "Megatron's distributed optimizer shares out the optimizer state, which is stage 1",
    ),
    Rule(
        {"engine": ("megatron",), "offload": ("optimizer", "parameters")},
        "offload is the deepspeed engine's",
    ),
    Rule(
        {"engine": ("deepspeed",), "zero_stage": (0,)},
        "DeepSpeed's stage 0 takes an optimizer step before the first one in bf16 (the weights "
        "decay, Adam counts one step too many) and reports no gradient norm in fp32",
    ),
    Rule(
        {"engine": ("deepspeed",), "zero_stage": (1, 2), "offload": ("parameters",)},
        "only stage 3 shares out the parameters, so only there can they leave the device",
    ),
    Rule(
        {"engine": ("deepspeed",), "zero_stage": (2,), "pipeline": (True,)},
        "with pipeline stages gradients stay whole until the last micro-batch, so stage 2 takes "
        "the memory of stage 1",
    ),
    Rule(
        {"engine": ("deepspeed",), "zero_stage": (3,), "pipeline": (True,)},
        "DeepSpeed compares the order of modules over all ranks, and stages have different ones",
    ),
    Rule(
        {"engine": ("deepspeed",), "context": (True,)},
        "context parallelism was not compared with one process under this engine",
    ),
    Rule(
        {"tp_comm_overlap": (True,)},
        "it is a feature of TransformerEngine's linear layers, and the blocks are built from "
        "Megatron's own",
    ),
    Rule(
        {"engine": ("deepspeed",), "zero_stage": (1,), "overlap_grad_reduce": (True,)},
        "stage 1 reduces gradients once, after the last micro-batch's backward pass",
    ),
    Rule(
        {"engine": ("deepspeed",), "overlap_param_gather": (True,)},
        "DeepSpeed gathers weights in its own way, right after the step, or at stage 3 ahead of "
        "each module",
    ),
    Rule(
        {"optimizer": ("muon",), "overlap_param_gather": (True,)},
        "every data parallel process updates all of its weights, so there is nothing to gather",
    ),
    Rule(
        {"overlap_grad_reduce": (False,), "overlap_param_gather": (True,)},
        "without buckets of gradients all weights are gathered as one, before the first layer",
    ),
)


def broken_rule(cell: Combination) -> Rule | None:
    """The first rule that a combination falls under; None when it works."""
    return next((rule for rule in RULES if rule.applies(cell)), None)


def is_layout(cell: Combination) -> bool:
    """Whether the layout is one at all: sequence needs tensor, virtual needs pipeline."""
    return (cell.tensor or not cell.sequence) and (cell.pipeline or not cell.virtual)


@functools.cache
def supported() -> tuple[Combination, ...]:
    """Every combination that works."""
    cells = (
        Combination(**dict(zip(AXES, values, strict=True)))
        for values in itertools.product(*(values for values, _ in AXES.values()))
    )
    return tuple(cell for cell in cells if is_layout(cell) and broken_rule(cell) is None)


def overlaps(config: Any, backend: str) -> tuple[bool, bool]:
    """Whether gradients are reduced, and weights gathered, while the model computes.

    What the run file leaves open is done with NCCL, where the matrix has it. Gloo's threads would
    take the cores that the model computes on.

    Args:
        config: the run, checked.
        backend: communication backend, "gloo" or "nccl".
    """
    asked = Combination.of(config)
    engine = config.engine
    for axis in ("overlap_grad_reduce", "overlap_param_gather"):
        if getattr(engine, axis) is None and backend == "nccl":
            wanted = replace(asked, **{axis: True})
            asked = asked if broken_rule(wanted) else wanted
    return asked.overlap_grad_reduce, asked.overlap_param_gather


def nearest(cell: Combination) -> Combination:
    """The combination that works and asks for the smallest change."""

    def distance(other: Combination) -> int:
        total = 0
        for axis, (values, weight) in AXES.items():
            steps = abs(values.index(getattr(cell, axis)) - values.index(getattr(other, axis)))
            total += weight * min(steps, 1) + steps
        return total

    return min(supported(), key=distance)


def spelled(cell: Combination, axes: Iterable[str]) -> str:
    """Values of some axes as keys of a run file, such as ``engine.zero_stage=2``."""
    words = []
    for axis in axes:
        value = getattr(cell, axis)
        if axis in ("tensor", "pipeline", "virtual", "context"):
            words.append(f"layout.{axis}={'2 or more' if value else 1}")
        elif axis == "sequence":
            words.append(f"layout.sequence={str(value).lower()}")
        elif isinstance(value, bool):
            words.append(f"engine.{axis}={str(value).lower()}")
        elif axis == "optimizer":
            words.append(f"optimizer.name={value}")
        else:
            words.append(f"engine.{'name' if axis == 'engine' else axis}={value}")
    return ", ".join(words)


def objection(cell: Combination) -> str | None:
    """What is wrong with a combination and the nearest one that works; None when it works."""
    rule = broken_rule(cell)
    if rule is None:
        return None
    better = nearest(cell)
    changed = [axis for axis in AXES if getattr(cell, axis) != getattr(better, axis)]
    return (
        f"{spelled(cell, rule.when)}: {rule.reason}; the nearest combination that works has "
        f"{spelled(better, changed)}"
    )


LAYOUT_AXES = {
    "tensor": "TP",
    "sequence": "SP",
    "pipeline": "PP",
    "virtual": "VPP",
    "context": "CP",
}

OVERLAP_AXES = {
    "overlap_grad_reduce": "grad_reduce",
    "overlap_param_gather": "param_gather",
    "tp_comm_overlap": "tp_comm",
}


def markdown_table() -> str:
    """The matrix for the documents: one row per engine, stage and offload.

    A layout dimension is listed when it works alone and together with the others in the row;
    so is an overlap.
    """
    cells = set(supported())
    rows = [
        "| engine | optimizer | ZeRO stage | offload | precision | layouts | overlap |",
        "|---|---|---|---|---|---|---|",
    ]
    for engine, optimizer, stage, offload in itertools.product(
        *(AXES[axis][0] for axis in ("engine", "optimizer", "zero_stage", "offload"))
    ):
        base = Combination(engine, optimizer, stage, offload)
        good = [p for p in AXES["precision"][0] if replace(base, precision=p) in cells]
        if not good:
            continue
        widest = [a for a in LAYOUT_AXES if _works_with(base, a, cells)]
        overlapped = [a for a in OVERLAP_AXES if _works_with(base, a, cells)]
        everything = replace(base, **dict.fromkeys(widest + overlapped, True))
        assert everything in cells, "one excludes another"
        rows.append(
            f"| {engine} | {optimizer} | {stage} | {offload} | {', '.join(good)} | "
            f"{', '.join(LAYOUT_AXES[a] for a in widest)} | "
            f"{', '.join(OVERLAP_AXES[a] for a in overlapped) or 'none'} |"
        )
    return "\n".join(rows)


def _works_with(base: Combination, axis: str, cells: set[Combination]) -> bool:
    needs = {
        "sequence": "tensor",
        "virtual": "pipeline",
        "overlap_param_gather": "overlap_grad_reduce",
    }
    wanted = {axis: True} | ({needs[axis]: True} if axis in needs else {})
    return replace(base, **wanted) in cells
