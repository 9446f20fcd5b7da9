"""What a run says about itself: its first lines, and `summary.json` when it is complete."""

import json
import math
import shlex
from pathlib import Path

from pretrain.config import RunConfig, filled_rows, support
from pretrain.config.checks.kernels import on_pytorch
from pretrain.data import DataPlan
from pretrain.engines.base import Engine
from pretrain.layout import Layout
from pretrain.resume import Start, TrainState
from pretrain.run_folder import SUMMARY_FILE
from pretrain.watching.progress import duration
from xlstm_io.storage import write_atomic
from xlstm_io.terminal import counted, tell
from xlstm_mcore import hardware


def describe_start(
    config: RunConfig, layout: Layout, engine: Engine, data: DataPlan, start: Start
) -> list[str]:
    """The first lines of a run: model, engine, layout, data, and where it starts.

    Args:
        config: the run.
        layout: where this process stands.
        engine: the model with its optimizer.
        data: the order of the run's data.
        start: what this process starts from.
    """
    shape = config.layout
    processes = counted(layout.world_size, "process", "processes")
    lines = [
        f"xLSTM {config.model.pattern}, {engine.num_parameters:,} parameters, "
        f"{config.engine.precision}; {config.engine.name} engine, ZeRO stage "
        f"{support.zero_stage(config)}, {processes} on {layout.device.type} "
        f"({layout.backend}): tensor {shape.tensor}{' with sequence' if shape.sequence else ''}"
        f", pipeline {shape.pipeline}, context {shape.context}, data {layout.dp_size}; "
        f"{config.tokens_per_step:,} tokens per step, {data.num_rows:,} rows",
        f"data: {data.summary(start.cursor.consumed_samples)}",
    ]
    cost = filled_rows(config, layout.dp_size)
    lines += [cost] if cost else []
    lines += on_pytorch(config) if layout.device.type != "cpu" else []
    if start.checkpoint is not None:
        lines.append(f"continuing from {start.checkpoint}")
    since = "changed since then" if start.checkpoint else "other than in run.init_from"
    lines += [f"{since}: {change}" for change in start.changes]
    lines += start.notes
    if start.state.step == config.run.steps:
        lines.append(f"all {config.run.steps} steps are done; set run.steps higher to train on")
    return lines


def write_summary(
    folder: Path,
    config: RunConfig,
    layout: Layout,
    engine: Engine,
    state: TrainState,
    valid_loss: float,
) -> None:
    """Write `summary.json` into a run's folder, and say that the run is done; called by all ranks.

    Args:
        folder: the run's folder.
        config: the run.
        layout: where this process stands.
        engine: the model with its optimizer.
        state: where the run stands.
        valid_loss: measured at its last step, nats per token; null in the file if not finite.
    """
    peak = hardware.peak_memory_bytes()
    total, largest = layout.sum(peak), layout.max(peak)
    if not layout.is_main:
        return
    trained = config.data.ramp.samples(state.step) * config.data.seq_len
    summary = {
        "steps": state.step,
        "tokens": state.tokens,
        "parameters": engine.num_parameters,
        "valid_loss": valid_loss if math.isfinite(valid_loss) else None,
        "seconds": state.seconds,
        "tokens_per_second": trained / max(state.seconds, 1e-9),
        "peak_memory_bytes": {"sum": int(total), "max": int(largest)},
        "processes": layout.world_size,
    }
    data = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    write_atomic(folder / SUMMARY_FILE, data.encode())
    tell(
        f"done: {counted(state.step, 'step')}, which took {duration(state.seconds)}; validation "
        f"loss {valid_loss:.3f}; curves: python -m pretrain report {shlex.quote(str(folder))}"
    )
