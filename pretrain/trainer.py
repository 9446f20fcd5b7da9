"""The training loop: one run, from its configuration to its last step."""

import json
import logging
import math
import os
import time
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pretrain import layout as layouts
from pretrain.checkpoint import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointSaver,
    Manifest,
    Retention,
    candidates_together,
    check_same_run,
    load_checkpoint,
    read_manifest_together,
)
from pretrain.config import RunConfig, save_config
from pretrain.config.support import zero_stage
from pretrain.data import DataCursor, Quarantine, TrainLoader, ValidLoader, open_plan, open_valid
from pretrain.engines import make_engine
from pretrain.engines.base import Engine, LossSum
from pretrain.layout import Layout
from pretrain.lr_schedule import make_schedule
from pretrain.metrics import Efficiency, MetricLogger, Speed
from pretrain.resume import TrainState
from pretrain.signals import StopSignal, any_rank
from xlstm_io.errors import ConfigError, ExitCode, UserError
from xlstm_io.storage import Location, write_atomic
from xlstm_mcore.megatron import cpu_runtime

log = logging.getLogger(__name__)

SUMMARY_FILE = "summary.json"
CONFIG_FILE = "config.yaml"


class DivergedError(UserError):
    """Loss or gradient stopped being finite, and the run is configured to stop then."""


def main(config: RunConfig) -> int:
    """Train as ``config`` says, from the newest complete checkpoint of its run folder.

    Called by every process of the run (see ``pretrain.commands.launch``).

    Returns:
        0 when the run is complete, 75 when it was asked to stop and has saved.

    Raises:
        UserError: bad configuration, data, checkpoint, or a diverged loss.
    """
    # Installed first: a signal during start-up waits for the first step.
    with StopSignal(announce=int(os.environ.get("RANK", "0")) == 0) as stop:
        layout = layouts.start(config)
        try:
            return Run(config, layout, stop).train()
        finally:
            layout.close()


class Run:
    """One process's part in a run."""

    def __init__(self, config: RunConfig, layout: Layout, stop: StopSignal) -> None:
        self.config, self.layout, self.stop = config, layout, stop
        self.dir = Path(config.run.dir)
        data = config.data
        place = {"dp_rank": layout.dp_rank, "dp_size": layout.dp_size}
        self.data = open_plan(data, config.run.seed)
        self.valid = {
            name: ValidLoader(dataset, micro_batch=data.micro_batch, **place)
            for name, dataset in open_valid(data, self.data).items()
        }
        self._check_vocabulary()
        self._check_kernels()
        self.engine: Engine = make_engine(config, layout)
        self.learning_rate = make_schedule(config.optimizer.lr, config.schedule, config.run.steps)
        options = config.checkpoint
        self.saver = CheckpointSaver(
            options.dir or self.dir / "checkpoints",
            retention=Retention(options.keep, options.keep_every, options.keep_best),
            asynchronous=options.asynchronous,
        )
        self.state, cursor = self._resume()
        self._check_writable()
        self.loader = TrainLoader(
            self.data,
            data.ramp,
            micro_batch=data.micro_batch,
            step=self.state.step,
            consumed_samples=cursor.consumed_samples,
            workers=data.workers,
            quarantine=Quarantine(
                data.max_quarantined, layout.own_file(self.dir, "quarantine"), cursor.quarantined
            ),
            **place,
        )
        self._speed = Speed()
        self._efficiency = Efficiency(config, layout)

    def train(self, until: int | None = None) -> int:
        """The loop; see the module. ``until``: stop after this step, as if asked to."""
        config, steps = self.config, self.config.run.steps
        with (
            self.loader,
            MetricLogger(
                self.dir,
                total_steps=steps,
                start_step=self.state.step,
                tensorboard=config.logging.tensorboard,
                enabled=self.layout.is_main,
            ) as metrics,
            self.saver,
        ):
            self._introduce(metrics)
            saved = self.state.step
            while self.state.step < steps:
                self._step(metrics)
                step = self.state.step
                stopping, save_failed = any_rank(
                    [self.stop.requested or step == until, self.saver.failed], self.layout.device
                )
                if save_failed:
                    self.saver.wait()  # raises on every rank
                last = step == steps
                if last or (step % config.evaluation.interval == 0 and not stopping):
                    self._evaluate(metrics)
                if last or stopping or step % config.checkpoint.interval == 0:
                    self._save(metrics)
                    saved = step
                if last or stopping:
                    self.saver.wait()
                self._tell_saved(metrics)
                if stopping and not last:
                    if self.stop.requested:
                        metrics.message(f"stopped after step {step}; run again to continue")
                    return ExitCode.STOPPED
            assert saved == self.state.step
        self._summarize()
        return ExitCode.DONE

    def _step(self, metrics: MetricLogger) -> None:
        """One optimizer step: batch, loss, verdict, update, log."""
        step, interval = self.state.step, self.config.logging.interval
        self.layout.seed_step(self.config.run.seed, step)
        started = time.perf_counter()
        loss = self.engine.forward_backward(next(self.loader))
        lr = self.learning_rate(step)
        result = self.engine.step(lr)
        self._judge(loss, result.grad_norm)
        seconds = time.perf_counter() - started
        self._speed.add(self.config.data.ramp.size(step) * self.config.data.seq_len, seconds)
        self.state = TrainState(
            step=step + 1,
            updates=self.state.updates + (not result.skipped),
            tokens=self.state.tokens + loss.tokens,
            seconds=self.state.seconds + seconds,
            valid_loss=self.state.valid_loss,
            valid_step=self.state.valid_step,
        )
        metrics.advance(self.state.step)
        if self.state.step % interval == 0 or self.state.step in (1, self.config.run.steps):
            speed = self._speed.take()
            metrics.log(
                self.state.step,
                {
                    "tokens": self.state.tokens,
                    "loss": loss.mean,
                    "lr": lr,
                    "grad_norm": result.grad_norm,
                    "tokens_per_second": speed,
                    **self._efficiency.of(speed),
                },
            )

    def _judge(self, loss: LossSum, grad_norm: float) -> None:
        """Every rank sees the same numbers, so every rank comes to the same verdict."""
        finite = math.isfinite(loss.total) and math.isfinite(grad_norm)
        if finite or not self.config.guard.stop_on_nonfinite:
            return
        options = self.config.optimizer
        remedy = f"lower optimizer.lr={options.lr}"
        if options.clip_grad == 0:
            remedy += ", or clip gradients: optimizer.clip_grad=0 never does"
        good = self.saver.last_good
        raise DivergedError(
            f"step {self.state.step + 1}: loss {loss.mean}, gradient norm {grad_norm}: not finite, "
            "so the update was not applied and the run stops (guard.stop_on_nonfinite=true); "
            f"{f'{good} is from before' if good else 'there is no checkpoint yet'}; {remedy}"
        )

    def _evaluate(self, metrics: MetricLogger) -> None:
        config = self.config
        losses = {}
        for name, loader in self.valid.items():
            batches: Any = iter(loader)
            if config.evaluation.max_batches is not None:
                rows = config.data.micro_batch * self.layout.dp_size
                per_global = config.data.global_batch // rows
                batches = islice(batches, config.evaluation.max_batches * per_global)
            losses[name] = self.engine.evaluate(batches).mean
        mean = sum(losses.values()) / len(losses)
        self.state = replace(self.state, valid_loss=mean, valid_step=self.state.step)
        each = {f"valid_loss/{name}": loss for name, loss in losses.items()}
        metrics.log(self.state.step, {"valid_loss": mean, **(each if len(each) > 1 else {})})

    def _save(self, metrics: MetricLogger) -> None:
        stall = self.saver.save(
            self.engine.sharded_state(),
            self._saved_state(),
            self.config.model_dump(mode="json"),
            step=self.state.step,
        )
        metrics.log(self.state.step, {"checkpoint_stall_seconds": stall})

    def _tell_saved(self, metrics: MetricLogger) -> None:
        """Report the checkpoint that was completed meanwhile, if any."""
        saved = self.saver.take_finished()
        if saved is not None:
            metrics.message(
                f"saved {saved.path} in {saved.seconds:.2f} s; training waited {saved.stall:.3f} s"
            )

    def _saved_state(self) -> dict[str, Any]:
        manifest = self.data.manifest
        if self.config.data.on_corrupt == "quarantine":
            for rows in self.layout.gather(self.loader.quarantine.rows):
                self.loader.quarantine.merge(rows)
        return {
            **asdict(self.state),
            "cursor": self.loader.cursor.to_dict(),
            "tokenizer": {
                "path": str(Path(manifest.tokenizer_path).resolve()),
                "sha256": manifest.tokenizer_sha256,
            },
        }

    def _resume(self) -> tuple[TrainState, DataCursor]:
        """State of the newest sound checkpoint, loaded into the engine; or a fresh start."""
        candidates = candidates_together(self.saver.folder, ranks=self.saver.ranks)
        for path in candidates:
            try:
                saved = read_manifest_together(path, ranks=self.saver.ranks)
                self._check_same_run(path, saved)
                state = TrainState(**{k: saved.state[k] for k in TrainState.__dataclass_fields__})
                self.engine.load_sharded_state(
                    lambda chunks, path=path: load_checkpoint(path, chunks, ranks=self.saver.ranks),
                    state.updates,
                )
            except CheckpointDamagedError as error:
                if self.layout.is_main:
                    log.warning("passing over a broken checkpoint: %s", error)
                self.saver.damaged.add(path)
                continue
            self.resumed_from = self.saver.last_good = path
            return state, DataCursor.from_dict(saved.state["cursor"])
        if candidates:
            raise CheckpointError(
                f"none of the {len(candidates)} checkpoints in {self.saver.folder} is sound; move "
                "them away to start anew"
            )
        return TrainState(), DataCursor(0)

    def _check_writable(self) -> None:
        """Write the configuration and try out the checkpoint folder, before any step is done."""
        self.saver.ranks.first(
            f"writing to run.dir={self.dir}",
            lambda: save_config(self.config, self.dir / CONFIG_FILE),
            "; use another run.dir",
        )
        self.saver.check_writable()

    def _check_same_run(self, path: Location, saved: Manifest) -> None:
        """Refuse a checkpoint of another model, data, tokenizer, or of a longer run."""
        consumed = DataCursor.from_dict(saved.state["cursor"]).consumed_samples
        now = {
            **self.config.model_dump(mode="json"),
            "tokenizer": {"sha256": self.data.manifest.tokenizer_sha256},
            "cursor": {"plan": self.data.describe(consumed)},
        }
        accept = self.config.checkpoint.accept_changes
        check_same_run({**saved.config, **saved.state}, now, path=path, accept=accept)
        if saved.step > self.config.run.steps:
            raise ConfigError(
                f"run.steps={self.config.run.steps}, but {path} has done {saved.step} steps "
                f"already; set run.steps to at least {saved.step}, or use another run.dir"
            )

    resumed_from: Location | None = None

    def _check_vocabulary(self) -> None:
        tokens, rows = self.data.manifest.vocab_size, self.config.model.vocab_size
        if tokens > rows:
            raise ConfigError(
                f"model.vocab_size={rows} is smaller than the {tokens} tokens of the tokenizer in "
                f"{self.data.manifest.root}; set model.vocab_size to at least {tokens}"
            )

    def _check_kernels(self) -> None:
        backend, device = self.config.model.kernel_backend, self.layout.device.type
        if backend == "triton" and device == "cpu":
            raise ConfigError(
                "model.kernel_backend=triton needs a GPU, and this run is on the CPU; leave it "
                "out to let each kernel take the best backend it has"
            )

    def _introduce(self, metrics: MetricLogger) -> None:
        config, layout = self.config, self.layout
        shape = config.layout
        metrics.message(
            f"xLSTM {config.model.pattern}, {self.engine.num_parameters:,} parameters, "
            f"{config.engine.precision}; {config.engine.name} engine, ZeRO stage "
            f"{zero_stage(config)}, {layout.world_size} processes on {layout.device.type} "
            f"({layout.backend}): tensor {shape.tensor}{' with sequence' if shape.sequence else ''}"
            f", pipeline {shape.pipeline}, context {shape.context}, data {layout.dp_size}; "
            f"{config.tokens_per_step:,} tokens per step, {self.data.num_rows:,} rows"
        )
        metrics.message(f"data: {self.data.summary(self.loader.consumed_samples)}")
        if self.resumed_from is not None:
            metrics.message(f"continuing from {self.resumed_from}")
        if self.state.step == config.run.steps:
            metrics.message(
                f"all {config.run.steps} steps are done; set run.steps higher to train on"
            )

    def _summarize(self) -> None:
        """Write summary.json; called by all ranks."""
        peak = cpu_runtime.peak_memory_bytes()
        (total,), largest = self.layout.sum(peak), self.layout.max(peak)
        if not self.layout.is_main:
            return
        state, config = self.state, self.config
        trained = config.data.ramp.samples(state.step) * config.data.seq_len
        summary = {
            "steps": state.step,
            "tokens": state.tokens,
            "parameters": self.engine.num_parameters,
            "valid_loss": state.valid_loss,
            "seconds": state.seconds,
            "tokens_per_second": trained / max(state.seconds, 1e-9),
            "peak_memory_bytes": {"sum": int(total), "max": int(largest)},
            "processes": self.layout.world_size,
        }
        write_atomic(self.dir / SUMMARY_FILE, (json.dumps(summary, indent=2) + "\n").encode())
