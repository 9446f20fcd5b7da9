"""Does a layout compute the same model as one process?

    python -m pretrain self-test run.yaml --nproc 4 --layout --small

A wrong combination of parallel dimensions trains without a word: a gradient that is not summed over
one of them, a weight that starts differently on two ranks, a state that does not cross a cut. So
three steps of the run, on random tokens, are computed by one process without any parallelism,
recomputation or partition, and by N processes as the run file says. Compared are the weights before
the first step, bit for bit; the losses and gradient norms; every gradient of the first step; every
weight and moment after three updates. The gradient of the first step is the optimizer's first
moment, which every engine keeps under the same names.

Rank 0 computes the reference while the others wait for it, and saves it in the run's folder, from
where every rank reads the slices that it holds itself (`pretrain.self_test.compare`).
"""

import gc
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain import layout as layouts
from pretrain.checkpoint import Ranks, save_checkpoint
from pretrain.config import RunConfig, support
from pretrain.engines import make_engine
from pretrain.engines.base import Engine
from pretrain.engines.state import optimizer_prefix
from pretrain.layout import Layout
from pretrain.self_test.batches import share_of
from pretrain.self_test.compare import (
    FACTOR,
    FLOOR,
    Difference,
    differences,
    parameter_of,
    position,
    uncounted,
)
from pretrain.self_test.smaller import smaller
from pretrain.self_test.weights import move_weights
from pretrain.trainer import train_step
from xlstm_io.checkpoint.manifest import is_weight, read_manifest
from xlstm_io.errors import ConfigError, ExitCode
from xlstm_io.signals import StopSignal
from xlstm_io.storage import Location

STEPS = 3
SAVED = (0, 1, STEPS)
# Adam's and Muon's first moment, which starts from zero.
GRADIENTS = (optimizer_prefix("exp_avg"), optimizer_prefix("momentum"))
# What one process is nudged by: some units in the last place of what it computes in.
NUDGES = {"fp32": 2.0**-20, "bf16": 2.0**-8}
SHOWN = 5
PATIENCE_S = 24 * 3600.0  # the others wait until rank 0 has computed the reference
Steps = list[tuple[float, float]]


@dataclass(frozen=True)
class Reference:
    """What one process has computed.

    Attributes:
        steps: loss and gradient norm of each step.
        nudged: the same from slightly other weights.
        saved: checkpoints by step.
        saved_nudged: the same from slightly other weights.
    """

    steps: Steps
    nudged: Steps
    saved: dict[int, Location]
    saved_nudged: dict[int, Location]


def main(config: RunConfig, *, small: bool = False) -> int:
    """Compare the layout of a run with one process; called by every one of its processes.

    Args:
        config: the run; its data are not read.
        small: make the model smaller first, see `pretrain.self_test.smaller`.

    Returns:
        0 when both are the same model, else `ExitCode.REFUTED`.

    Raises:
        UserError: the run cannot start on this layout, or its folder cannot be written.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        raise ConfigError("--layout compares several processes with one; give --nproc 2 or more")
    if small:
        config = smaller(config, world_size)
    config = _comparable(config)
    first = os.environ["RANK"] == "0"
    with StopSignal(announce=first) as stop:
        folder = Path(config.run.dir) / f"self-test-{secrets.token_hex(4)}"
        try:
            reference = _reference(config, folder, stop) if first else None
            layout = layouts.start(config, stop)
            reference = Ranks().broadcast(reference)
            text, same = _compare(config, layout, reference)
        finally:
            if first:
                shutil.rmtree(folder, ignore_errors=True)
        if layout.is_main:
            print(text, flush=True)
        layout.close()
        return ExitCode.DONE if same else ExitCode.REFUTED


def _comparable(config: RunConfig) -> RunConfig:
    """The run without what differs between layouts on purpose."""
    raw = config.model_dump()
    raw["model"]["dropout"] = 0.0
    raw["data"]["batch_ramp"] = []
    raw["guard"]["rendezvous_timeout"] = max(config.guard.rendezvous_timeout, PATIENCE_S)
    return RunConfig.model_validate(raw)


def _one_process(config: RunConfig) -> RunConfig:
    """The same run in the plainest way: nothing is split, partitioned or computed twice."""
    raw = config.model_dump()
    raw["model"]["pattern"] = config.model.pattern.replace("|", "")
    raw["engine"] = {"precision": config.engine.precision}
    del raw["layout"], raw["memory"]
    return RunConfig.model_validate(raw)


def _reference(config: RunConfig, folder: Path, stop: StopSignal) -> Reference:
    """What one process computes, twice; on rank 0, before it meets the others."""
    plain = _one_process(config)
    layout = layouts.start(plain, stop, alone=True)
    found = []
    for nudge in (0.0, NUDGES[config.engine.precision]):
        saved: dict[int, Location] = {}
        steps: Steps = []
        for step, engine in _train(plain, layout, steps, nudge):
            saved[step] = save_checkpoint(
                folder / f"nudged-{nudge}",
                engine.sharded_state(),
                {},
                plain.model_dump(mode="json"),
                step=step,
            )
        found.append((steps, saved))
    layout.close()
    (steps, saved), (nudged, saved_nudged) = found
    return Reference(steps, nudged, saved, saved_nudged)


def _train(
    config: RunConfig, layout: Layout, steps: Steps, nudge: float = 0.0
) -> Iterator[tuple[int, Engine]]:
    """Train, and give the engine back at every step of `SAVED`; adds to `steps`."""
    engine = make_engine(config, layout)
    move_weights(engine, nudge)
    for step in range(STEPS + 1):
        if step in SAVED:
            yield step, engine
        if step < STEPS:
            result = train_step(engine, share_of(config, layout, step), config.optimizer.lr)
            steps.append((result.loss, result.grad_norm))
    engine.close()
    del engine
    gc.collect()  # its memory is needed for the next one


def _compare(config: RunConfig, layout: Layout, reference: Reference) -> tuple[str, bool]:
    """The report, and whether the layout computes the same model; the same on every rank."""
    steps: Steps = []
    shapes = {n: i.shape for n, i in read_manifest(reference.saved[0]).tensors.items()}
    lines, wrong = [_title(config, layout)], []
    for step, engine in _train(config, layout, steps):
        if step:
            here = range(1, 2) if step == 1 else range(2, STEPS + 1)
            lines_of, wrong_of = _compare_numbers(here, steps, reference)
            lines, wrong = lines + lines_of, wrong or wrong_of
        # A gradient's own difference, and not that of the norm by which all of them are clipped.
        scale = 1.0
        if step == 1:
            scale = _clipping(config, reference.steps[0][1]) / _clipping(config, steps[0][1])
        found = differences(
            [part for part in engine.sharded_state() if _is_compared(step, part.name)],
            reference.saved[step],
            reference.saved_nudged[step],
            layout,
            scale,
            exact=step == 0,
        )
        wanted = {name: shape for name, shape in shapes.items() if _is_compared(step, name)}
        lines_of, wrong_of = _describe(step, found)
        lines, wrong = lines + lines_of, wrong or [*uncounted(found, wanted), *wrong_of]
    if not wrong:
        lines.append(
            f"layout self-test passed: {layout.world_size} processes compute the model of one"
        )
        return "\n".join(lines), True
    lines.append("layout self-test failed; the first that differs is the likeliest cause:")
    return "\n".join([*lines, *(f"  {text}" for text in wrong)]), False


def _is_compared(step: int, name: str) -> bool:
    """Weights before the first step, gradients after it, everything at the end."""
    if step == 0:
        return is_weight(name)
    return step > 1 or name.startswith(GRADIENTS)


def _clipping(config: RunConfig, norm: float) -> float:
    limit = config.optimizer.clip_grad
    return min(1.0, limit / norm) if limit and norm else 1.0


def _title(config: RunConfig, layout: Layout) -> str:
    shape, model = config.layout, config.model
    return (
        f"{model.pattern}, hidden_size {model.hidden_size}, {config.engine.precision}, "
        f"{config.engine.name} engine, ZeRO stage {support.zero_stage(config)}: "
        f"{layout.world_size} processes on {layout.device.type}, tensor {shape.tensor}"
        f"{' with sequence' if shape.sequence else ''}, pipeline {shape.pipeline}, virtual "
        f"{shape.virtual}, context {shape.context}, data {layout.dp_size}, beside one process"
    )


def _compare_numbers(
    steps: Iterable[int], ours: Steps, reference: Reference
) -> tuple[list[str], list[str]]:
    """A line for losses and gradient norms of some steps, from 1, and what is wrong with them."""
    lines, wrong = [], []
    for step in steps:
        number = step - 1
        for kind, name in enumerate(("loss", "gradient norm")):
            got, true = ours[number][kind], reference.steps[number][kind]
            error = abs(got - true) / abs(true)
            noise = abs(reference.nudged[number][kind] - true) / abs(true)
            limit = max(FLOOR, FACTOR * noise)
            text = f"step {step}: {name} {got:.9g}, of one process {true:.9g}"
            lines.append(f"{text}: {_verdict(error, limit)}")
            if not error <= limit:  # true for nan too
                wrong.append(f"{text}, {error:.1e} apart where rounding explains {limit:.1e}")
    return lines, wrong


def _describe(step: int, found: dict[str, Difference]) -> tuple[list[str], list[str]]:
    """A line for the tensors compared at a step, and one for each that is wrong, likeliest first.

    A mistake in the backward pass spoils every gradient after it, so the one next to the loss is
    named first; among the weights, that next to the input.
    """
    what = {0: "initial weights", 1: "gradients of step 1"}.get(
        step, f"weights and moments after {step} updates"
    )
    bad = [name for name, one in found.items() if one.ranks]
    bad.sort(key=lambda name: position(parameter_of(name)), reverse=step == 1)
    largest = max(found, key=lambda name: found[name].relative / max(found[name].limit, 1e-30))
    lines = [
        f"{what}: {len(found) - len(bad)} of {len(found)} tensors alike; nearest to its limit is "
        f"{largest}: {_verdict(found[largest].relative, found[largest].limit)}"
    ]
    wrong = [_line(what, name, found[name]) for name in bad[:SHOWN]]
    if len(bad) > SHOWN:
        wrong.append(f"and {len(bad) - SHOWN} more of {len(found)}")
    return lines, wrong


def _line(what: str, name: str, one: Difference) -> str:
    ranks = ", ".join(map(str, sorted(one.ranks)))
    return (
        f"{what}: {parameter_of(name)} differs by {one.relative:.1e} of its size where rounding "
        f"explains {one.limit:.1e}, in what rank {ranks} holds"
    )


def _verdict(error: float, limit: float) -> str:
    return f"{error:.1e} apart, limit {limit:.1e}"
