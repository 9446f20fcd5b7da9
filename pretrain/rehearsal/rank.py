"""The rehearsal of one rank: build, two steps, evaluation, save, load, and a checked step."""

import dataclasses
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from pretrain import layout as layouts
from pretrain.config import RunConfig, data_parallel_size
from pretrain.config import micro_batches as of_a_step
from pretrain.data import Batch
from pretrain.engines import make_engine
from pretrain.engines.base import Engine
from pretrain.engines.megatron import MegatronEngine
from pretrain.guard.replicas import ReplicaWatcher
from pretrain.layout import Layout
from pretrain.rehearsal.device import RehearsalMode, as_rank
from pretrain.rehearsal.memory import claim_lasting, watch_model
from pretrain.rehearsal.record import STEADY, RankRecord, SavedSlice
from pretrain.trainer import train_step
from pretrain.watching.metrics import MetricLogger
from pretrain.watching.watcher import StepWatcher, WatchedStep
from xlstm_io.checkpoint.reader import TensorSlice


def micro_batches(config: RunConfig, world: int) -> tuple[int, int]:
    """How many micro-batches a step has in the rehearsal, and in the run.

    Twice the pipeline's stages show its warm-up, its steady state and its end. More of them repeat
    what these do.
    """
    real = of_a_step(config, data_parallel_size(config, world))
    return min(real, 2 * config.layout.pipeline), real


def rehearse_rank(
    config: RunConfig, rank: int, world: int, *, steps_only: bool = False
) -> RankRecord:
    """Play one rank of a run and write down what it does.

    Args:
        config: the run.
        rank: the rank to play.
        world: the number of ranks of the run.
        steps_only: leave out evaluation, saving, loading and the step after it.

    Raises:
        ConfigError: the world does not fit the layout, or DeepSpeed is asked for and missing.
    """
    started = time.perf_counter()
    record = RankRecord(rank, micro_batches=micro_batches(config, world))
    mode = RehearsalMode(record)
    with as_rank(rank, world, mode):
        # What is decided by the backend is decided as on GPUs.
        layout = dataclasses.replace(layouts.start(config), backend="nccl")
        try:
            record.place = _place(layout)
            with _devices_of(config, mode), mode:
                _run(config, layout, mode, record, steps_only)
        finally:
            layout.close()
    record.seconds = time.perf_counter() - started
    return record


def _place(layout: Layout) -> dict[str, int]:
    groups = layout.groups
    names = {"tensor": groups.tp, "pipeline": groups.pp, "context": groups.cp, "data": groups.dp}
    return {name: group.rank() for name, group in names.items()}


def _devices_of(config: RunConfig, mode: RehearsalMode) -> AbstractContextManager:
    """What the engine needs to find the device that does not exist."""
    if config.engine.name == "megatron":
        return nullcontext()
    from pretrain.rehearsal.deepspeed import deepspeed_accelerator

    return deepspeed_accelerator(mode)


def _claim_lasting(mode: RehearsalMode, engine: Engine) -> None:
    """Tell apart the kinds of memory that last for the whole run."""
    if isinstance(engine, MegatronEngine):
        claim_lasting(mode.meter, engine)
    else:
        from pretrain.rehearsal import deepspeed

        deepspeed.claim_lasting(mode, engine)


def _run(
    config: RunConfig, layout: Layout, mode: RehearsalMode, record: RankRecord, steps_only: bool
) -> None:
    engine = make_engine(config, layout)
    _claim_lasting(mode, engine)
    watch_model(mode.meter, engine.models)

    def step(phase: str, *watchers: StepWatcher) -> list[Batch]:
        mode.phase = phase
        layout.seed_step(config.run.seed, 0)
        batches = _batches(config, record.micro_batches[0])
        train_step(engine, batches, config.optimizer.lr, watchers=watchers)
        return batches

    mode.meter.start_peak()
    step("step 1")
    step(STEADY)
    record.memory = mode.meter.result()
    if not steps_only:
        _save_and_load(config, engine, mode, record)
        every = config.guard.check_replicas
        watchers = [ReplicaWatcher(config, layout, engine)] if every else []
        batches = step("step 3", *watchers)
        mode.phase = "replica check"
        for watcher in watchers:
            quiet = MetricLogger("", total_steps=every, enabled=False)
            watcher.tell(WatchedStep(every, batches, 0.0), quiet)
    engine.close()


def _save_and_load(
    config: RunConfig, engine: Engine, mode: RehearsalMode, record: RankRecord
) -> None:
    mode.phase = "evaluation"
    engine.evaluate(_batches(config, 2))
    mode.phase = "save"
    for part in engine.sharded_state():
        if part.tensor.numel():
            record.saved.append(
                SavedSlice(
                    part.name, tuple(part.global_shape), tuple(part.global_offset),
                    tuple(part.tensor.shape),
                )
            )  # fmt: skip
            record.saved_bytes += part.tensor.numel() * part.tensor.element_size()
    mode.phase = "load"
    engine.load_sharded_state(_overwrite, 2)


def _overwrite(slices: Sequence[TensorSlice]) -> None:
    """Stands for the reader of checkpoints: fills every slice that the engine asks for."""
    for part in slices:
        part.tensor.zero_()


def _batches(config: RunConfig, number: int) -> list[Batch]:
    """Micro-batches in host memory, as the loader gives them."""
    shape = config.data.micro_batch, config.data.seq_len
    return [
        Batch(
            torch.zeros(shape, dtype=torch.int64),
            torch.zeros(shape, dtype=torch.int64),
            torch.ones(shape),
            torch.zeros(shape, dtype=torch.bool),
            torch.zeros(shape[0], 0, dtype=torch.float64),
        )
        for _ in range(number)
    ]
