"""Which combinations of engine, ZeRO stage, offload, precision and layout work, written as data.

The rules below say what does *not* work and why. Every other combination is supported.
tests/dist/test_engines.py trains a sample of the supported ones, in which every two values of its
axes meet, and compares each with one process. The checks of the configuration take their messages
from here, and the documents their table (`markdown_table`).

Nothing here imports torch.
"""

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from pretrain.config.schema import RunConfig


@dataclass(frozen=True)
class Combination:
    """One combination of the support matrix.

    The layout's entries (`tensor`, `pipeline`, `virtual`, `context`) say whether that size is
    larger than 1.
    """

    engine: str = "megatron"
    optimizer: str = "adamw"
    zero_stage: int = 1
    offload: str = "none"
    precision: str = "fp32"
    grad_reduce: str = "fp32"
    tensor: bool = False
    sequence: bool = False
    pipeline: bool = False
    virtual: bool = False
    context: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    @classmethod
    def of(cls, config: RunConfig) -> "Combination":
        """The combination that a run asks for, with the ZeRO stage that `zero_stage` chooses."""
        engine, layout = config.engine, config.layout
        asked = cls(
            engine=engine.name,
            optimizer=config.optimizer.name,
            offload=engine.offload,
            precision=engine.precision,
            grad_reduce=engine.grad_reduce,
            tensor=layout.tensor > 1,
            sequence=layout.sequence,
            pipeline=layout.pipeline > 1,
            virtual=layout.virtual > 1,
            context=layout.context > 1,
            # Null is decided by engine and device, within the matrix: see `overlaps`.
            overlap_grad_reduce=engine.overlap_grad_reduce is True,
            overlap_param_gather=engine.overlap_param_gather is True,
        )
        if engine.zero_stage is not None:
            return replace(asked, zero_stage=engine.zero_stage)
        stages = [replace(asked, zero_stage=stage) for stage in _PREFERRED_STAGES]
        return next((cell for cell in stages if broken_rule(cell) is None), stages[0])


# `engine.zero_stage: null` means the first of these that works. Stage 1 comes first, because
# sharing out the optimizer state costs no time. Stages 2 and 3 send more messages.
_PREFERRED_STAGES = (1, 0, 2, 3)


# The values of each axis, and what it costs a user to change it: `suggest` looks for the supported
# combination that costs least.
AXES: dict[str, tuple[tuple[Any, ...], int]] = {
    "engine": (("megatron", "deepspeed"), 1),
    "optimizer": (("adamw", "muon"), 6),
    "zero_stage": ((0, 1, 2, 3), 2),
    "offload": (("none", "optimizer", "parameters"), 3),
    "precision": (("fp32", "bf16"), 20),
    "grad_reduce": (("fp32", "bf16"), 1),
    "tensor": ((False, True), 10),
    "sequence": ((False, True), 9),
    "pipeline": ((False, True), 8),
    "virtual": ((False, True), 5),
    "context": ((False, True), 10),
    "overlap_grad_reduce": ((False, True), 0),
    "overlap_param_gather": ((False, True), 1),
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
        """Whether `cell` falls under this rule."""
        return all(getattr(cell, axis) in values for axis, values in self.when.items())


RULES: tuple[Rule, ...] = (
    Rule(
        {"optimizer": ("muon",), "engine": ("deepspeed",)},
        "Muon needs whole matrices, and DeepSpeed's partitions cut them",
    ),
    Rule(
        {"optimizer": ("muon",), "zero_stage": (1, 2, 3)},
        "Muon shares out whole matrices over data parallel processes by itself, and a ZeRO stage "
        "would cut them",
    ),
    Rule(
        {"precision": ("fp32",), "grad_reduce": ("bf16",)},
        "the gradients of fp32 weights are fp32, and rounding them would undo the precision",
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


def zero_stage(config: RunConfig) -> int:
    """The ZeRO stage of a run: `engine.zero_stage`, or where it is null the best one that works.

    That is 1 with AdamW, 0 with Muon, and 3 where DeepSpeed is to keep the parameters in host
    memory.
    """
    return Combination.of(config).zero_stage


def overlaps(config: RunConfig, backend: str) -> tuple[bool, bool]:
    """Whether gradients are reduced, and weights gathered, while the model computes.

    An overlap that the run file leaves open is done with NCCL, where the matrix supports it. With
    gloo it is not done, because gloo's threads would take the cores that the model computes on.

    Args:
        config: the run, checked.
        backend: communication backend, "gloo" or "nccl".

    Returns:
        (whether gradients are reduced meanwhile, whether weights are gathered meanwhile).
    """
    asked = Combination.of(config)
    for axis in ("overlap_grad_reduce", "overlap_param_gather"):
        if getattr(config.engine, axis) is None and backend == "nccl":
            change: dict[str, Any] = {axis: True}
            wanted = replace(asked, **change)
            asked = asked if broken_rule(wanted) else wanted
    return asked.overlap_grad_reduce, asked.overlap_param_gather


def suggest(cell: Combination) -> Combination:
    """The supported combination that asks for the smallest change."""

    def cost_of(other: Combination) -> int:
        total = 0
        for axis, (values, cost) in AXES.items():
            steps = abs(values.index(getattr(cell, axis)) - values.index(getattr(other, axis)))
            total += cost * min(steps, 1) + steps
        return total

    return min(supported(), key=cost_of)


def as_config_keys(cell: Combination, axes: Iterable[str]) -> str:
    """Values of some axes as keys of a run file, such as `engine.zero_stage=2`."""
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


def unsupported_reason(cell: Combination) -> str | None:
    """Why a combination does not work, and a similar one that does; None when it works."""
    rule = broken_rule(cell)
    if rule is None:
        return None
    better = suggest(cell)
    changed = [axis for axis in AXES if getattr(cell, axis) != getattr(better, axis)]
    return (
        f"{as_config_keys(cell, rule.when)}: {rule.reason}; the nearest combination that works has "
        f"{as_config_keys(better, changed)}"
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
        together: dict[str, Any] = dict.fromkeys(widest + overlapped, True)
        everything = replace(base, **together)
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
    wanted: dict[str, Any] = {axis: True} | ({needs[axis]: True} if axis in needs else {})
    return replace(base, **wanted) in cells
