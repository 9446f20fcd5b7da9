"""The training loop: one run, from its configuration to its last step.

`train_step` is one step on the device, and `Trainer._step` is that step with its data, its learning
rate and its line in the log. Everything else in here decides what happens between two steps.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain.checkpoint import Candidates, CheckpointSaver, Ranks, Retention
from pretrain.config import RunConfig, save_config
from pretrain.config.checks.fields import check_vocabulary
from pretrain.config.checks.kernels import check_kernels
from pretrain.data import Batch, open_plan
from pretrain.data.tokenizer_files import tokenizer_files
from pretrain.engines import make_engine
from pretrain.engines.base import Engine
from pretrain.engines.verdict import FINITE, Guard, StepResult
from pretrain.evaluation.samples import Samples
from pretrain.guard.divergence import DivergedError, RejectedStep, diverged, keep_evidence
from pretrain.guard.replicas import ReplicaWatcher
from pretrain.layout import Layout
from pretrain.resume import open_loader, resume, with_vocab_tokens
from pretrain.run_folder import CONFIG_FILE, checkpoints_of
from pretrain.supervision.events import report
from pretrain.supervision.job_end import stop_in_time
from pretrain.supervision.lease import Lease
from pretrain.supervision.progress_file import Progress, read_progress
from pretrain.supervision.watchdog import CHECKPOINT, STARTUP, STEP, Watchdog
from pretrain.validation import Validation
from pretrain.watching.cells import CellWatcher
from pretrain.watching.interval import Interval
from pretrain.watching.metric_writers import open_writers
from pretrain.watching.metrics import MetricLogger
from pretrain.watching.milestones import MilestoneWatcher
from pretrain.watching.profile import ProfileWatcher
from pretrain.watching.provenance import provenance
from pretrain.watching.ranks import RankWatcher
from pretrain.watching.starts import record_life
from pretrain.watching.summary import describe_start, write_summary
from pretrain.watching.watcher import StepWatcher, WatchedStep
from xlstm_io.checkpoint.lives import check_newest
from xlstm_io.checkpoint.manifest import step_of_folder
from xlstm_io.errors import ExitCode, MachineFailed
from xlstm_io.signals import StopSignal
from xlstm_io.storage import absolute


def train_step(
    engine: Engine,
    batches: list[Batch],
    lr: float,
    guard: Guard = FINITE,
    votes: Sequence[bool] = (),
    watchers: Sequence[StepWatcher] = (),
) -> StepResult:
    """One optimizer step of one global batch; called by all ranks.

    The update is judged before it is made: a step that is not finite, or beyond the limits of
    `guard`, leaves weights and optimizer as they were.

    Args:
        engine: the model with its optimizer.
        batches: this replica's micro-batches.
        lr: learning rate.
        guard: the limits of this step.
        votes: what this rank votes for; see `StepResult.votes`.
        watchers: what looks at this step; most steps have none.
    """
    with ExitStack() as watching:
        for watcher in watchers:
            watching.enter_context(watcher)
        loss = engine.forward_backward(batches)
        verdict = guard.judge(loss, engine.gradient_norm(), votes)
        for watcher in watchers:
            watcher.before_update()
        engine.step(lr, verdict)
        for watcher in watchers:
            watcher.enqueued()
        return verdict.read()  # the only time in a step that the host waits for the device


class Trainer:
    """One process's part in a run.

    Args:
        config: the run.
        layout: where this process stands.
        stop: the request to stop, read once per step.
        lease: the right to write into the run's folder, on rank 0; None elsewhere, and for tools
            that train in a folder of their own.
        watchdog: is told whenever this rank has moved on; None where nobody watches.

    Attributes:
        state: where the run stands.
        evaluation: the newest validation loss; None before the first.
        life: number of this life of the run; 0 without a lease.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        stop: StopSignal,
        lease: Lease | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.config, self.layout, self.stop, self.lease = config, layout, stop, lease
        self.dir = Path(config.run.dir)
        self.watchdog = watchdog or Watchdog(self.dir, layout.rank, None)
        options = config.checkpoint
        self.data = open_plan(config.data, config.run.seed, check_files=layout.is_main)
        self.validation = Validation(config, layout, self.data)
        self.samples = Samples(config, layout, self.data.manifest, Ranks())
        check_vocabulary(config, self.data.manifest.vocab_size, self.data.manifest.root)
        check_kernels(config, layout.device)
        self.saver = CheckpointSaver(
            checkpoints_of(config),
            retention=Retention(options.keep, options.keep_every, options.keep_best),
            asynchronous=options.asynchronous,
            files=tokenizer_files(self.data.manifest) if layout.is_main else None,
            fence=self._fence,
            waiting=lambda: self.watchdog.moved(CHECKPOINT, self.state.step),
        )
        self.life: int = self.saver.ranks.broadcast(lease.life if lease else 0)
        checkpoints = Candidates(self.saver.folder, self.saver.ranks)
        self.config = config = with_vocab_tokens(
            config, self.data.manifest.vocab_size, checkpoints, self.saver.ranks
        )
        self.engine: Engine = make_engine(config, layout, initial_values=not checkpoints)
        self.start = resume(config, self.data, self.engine, self.saver, checkpoints)
        self.state, self.evaluation = self.start.state, self.start.evaluation
        self.divergence = self.start.divergence
        self.saver.onset = self.divergence.onset
        if layout.device.type != "cpu":
            self.saver.prepare(self.engine.sharded_state())
        self.learning_rate = self.start.curve.rates(config.optimizer.lr, config.schedule)
        self._check_writable()
        manifests = [one.manifest for one in self.data.datasets]
        self.provenance = provenance(manifests) if layout.is_main else {}
        record_life(self.life, config, self.start, layout.world_size, self.saver, self.provenance)
        self.loader = open_loader(config, layout, self.data, self.start)
        self._ranks = RankWatcher(config, layout)
        self._watchers = (
            ReplicaWatcher(config, layout, self.engine),
            CellWatcher(config, layout, self.engine),
            self._ranks,
            ProfileWatcher(config, layout, self.state.step),
            MilestoneWatcher(config, layout, self.start, self.life),
        )
        self._step_seconds: float | None = None
        before = read_progress(self.dir) if lease else None
        self._save_seconds = None if before is None else before.save_seconds
        stop_in_time(stop, self._save_seconds, self._step_seconds)
        self._write_progress("running")
        self._interval = Interval(config, layout)

    def train(self, until: int | None = None) -> int:
        """Train to the last step of the run.

        Args:
            until: stop after this step, as if asked to.

        Returns:
            0 when the run is complete, 75 when it stopped before and has saved.
        """
        config, steps = self.config, self.config.run.steps
        with (
            self.loader,
            MetricLogger(
                self.dir,
                total_steps=steps,
                start_step=self.state.step,
                writers=open_writers(config, self.state.step) if self.layout.is_main else (),
                enabled=self.layout.is_main,
            ) as metrics,
            self.saver,
        ):
            for line in describe_start(config, self.layout, self.engine, self.data, self.start):
                metrics.message(line)
            # The life before this one may have ended before it had measured its last step.
            missing = self.evaluation is None and self.validation.due(self.state.step)
            self.watchdog.ask(self.loader.waits_for)
            stopping = missing and not self._evaluate(metrics)
            self.watchdog.moved(STARTUP, self.state.step)
            while self.state.step < steps and not stopping:
                stopping, save_failed, superseded = self._step(metrics, until)
                if save_failed:
                    self.saver.wait()  # raises on every rank
                if superseded:
                    self._check_lease()  # raises on every rank
                step = self.state.step
                last = step == steps
                save = last or stopping or step % config.checkpoint.interval == 0
                if save:
                    self._save(metrics)
                # After the save: an evaluation takes long, and nothing is lost when it is cut.
                if not stopping and self.validation.due(step) and not self._evaluate(metrics):
                    stopping = True
                    if not save:
                        self._save(metrics)
                if last or stopping:
                    self.saver.wait()
                self.watchdog.moved(STEP, step)
                self._report_finished_save(metrics)
            self._check_recorded(metrics)
            if stopping:
                if self.stop.requested:
                    why, step = self.stop.reason, self.state.step
                    metrics.message(f"stopped after step {step}: {why}; run again to continue")
                self._tell("stopped", self.stop.reason if self.stop.requested else "")
                return ExitCode.STOPPED
        self._check_lease()
        assert self.evaluation is not None  # the last step is always measured
        loss = self.evaluation.loss
        write_summary(self.dir, config, self.layout, self.engine, self.state, loss)
        self._tell("done")
        return ExitCode.DONE

    def _step(self, metrics: MetricLogger, until: int | None) -> tuple[bool, ...]:
        """One step: batch, forward and backward, verdict, update, log.

        Returns:
            Whether the run is to stop now, whether a checkpoint could not be written, and whether
            a newer life of the run has been seen; the same on every rank.
        """
        config, step = self.config, self.state.step
        lr = self.learning_rate(step)
        self.layout.seed_step(config.run.seed, step)
        started = time.perf_counter()
        batches = next(self.loader)
        data_wait = time.perf_counter() - started
        # Ranks hear of both at different times, and must leave the loop together.
        votes = (
            self.stop.requested or step + 1 == until or metrics.fault is not None,
            self.saver.failed,
            self.lease is not None and self.lease.lost,
        )
        limits = self.divergence.limits()
        watchers = [watcher for watcher in self._watchers if watcher.due(step + 1)]
        result = train_step(self.engine, batches, lr, limits, votes, watchers)
        seconds = time.perf_counter() - started
        self.divergence.note(step + 1, result)
        if not result.accepted:
            first = self.loader.consumed_samples - config.data.ramp.size(step)
            self._reject(RejectedStep(step + 1, result, limits, lr, first), metrics)
        self._interval.add(step, seconds, data_wait)
        self.state = self.state.after(result, seconds, self.data.source_names)
        self._step_seconds = seconds
        done = self.state.step
        self.watchdog.moved(STEP, done)  # the first step of a life still counts as start-up
        metrics.advance(done)
        if done % config.logging.interval == 0 or done in (1, config.run.steps):
            self._write_progress("running")
            metrics.log(done, self._interval.take(self.state, result, lr))
            self.state = self.state.logged()
        for watcher in watchers:
            watcher.tell(WatchedStep(done, batches, data_wait), metrics)
        return result.votes

    def _reject(self, rejected: RejectedStep, metrics: MetricLogger) -> None:
        """Keep the evidence of a step whose update was not applied; raise if the run stops there.

        Called by all ranks.
        """
        config, rows = self.config, self.config.data.micro_batch
        self.saver.onset = self.divergence.onset
        own = self.engine.own_losses
        fault = keep_evidence(self.dir, self.life, rejected, own, self.layout, rows)
        if fault is not None:
            metrics.message(f"the samples of step {rejected.step} are not recorded: {fault}")
        key = self.divergence.must_stop(rejected.result)
        if key is not None:
            why = diverged(config, rejected, key, self.saver.last_good, fault is None)
            self._tell("diverged", why)
            raise DivergedError(why)
        metrics.message(f"{rejected}; the update was not applied")

    def _evaluate(self, metrics: MetricLogger) -> bool:
        """Measure the validation loss; False when a rank was asked to stop meanwhile."""
        step = self.state.step
        found = self.validation.measure(
            self.engine, step, self.stop, self.watchdog, metrics.evaluating
        )
        if found is None:
            return False
        self.evaluation = found
        each = {f"valid_loss/{name}": loss for name, loss in found.sets.items()}
        metrics.log(step, {"valid_loss": found.loss, **(each if len(each) > 1 else {})})
        self.saver.record(found)
        for sample in self.samples.take(self.engine, step, self.stop, self.watchdog):
            metrics.message(f"{sample.prompt!r} goes on: {sample.text!r}")
        return True

    def _save(self, metrics: MetricLogger) -> None:
        stall = self.saver.save(
            self.engine.sharded_state(),
            self._state_to_save(),
            self.config.model_dump(mode="json"),
            step=self.state.step,
        )
        metrics.log(self.state.step, {"checkpoint_stall_seconds": stall})

    def _report_finished_save(self, metrics: MetricLogger) -> None:
        """Report the checkpoint that was completed since the last call, if any."""
        saved = self.saver.take_finished()
        if saved is not None:
            metrics.message(
                f"saved {saved.path} in {saved.seconds:.2f} s; training waited {saved.stall:.3f} s"
            )
            self._save_seconds = saved.seconds
            stop_in_time(self.stop, self._save_seconds, self._step_seconds)
            self._write_progress("running")

    def _tell(self, event: str, why: str = "") -> None:
        """Tell `progress.json`, the history and `run.on_event`; on rank 0 of a run with a lease."""
        self._write_progress(event)
        if self.lease is not None:
            found, good = self.evaluation, self.saver.last_good
            loss = None if found is None else found.loss
            report(self.config, event, why, self.state.step, self.life, good, loss)

    def _write_progress(self, status: str) -> None:
        """Tell other programs how far the run is; on rank 0."""
        if self.lease is None:
            return
        good = self.saver.last_good
        Progress(
            status=status,
            step=self.state.step,
            steps=self.config.run.steps,
            life=self.life,
            checkpoint=None if good is None else str(good),
            checkpoint_step=None if good is None else step_of_folder(good),
            step_seconds=self._step_seconds,
            save_seconds=self._save_seconds,
            stragglers=self._ranks.stragglers,
        ).write(self.dir)

    def _state_to_save(self) -> dict[str, Any]:
        """The training state of a checkpoint; called by all ranks."""
        manifest = self.data.manifest
        tokenizer = str(absolute(manifest.tokenizer_path))
        if self.config.data.on_corrupt == "quarantine":
            for rows in self.layout.gather(self.loader.quarantine.take_new()):
                self.loader.quarantine.merge(rows)
        return {
            **asdict(self.state),
            "life": self.life,
            "provenance": self.provenance,
            "curve": self.start.curve.to_dict(),
            "divergence": self.divergence.to_dict(),
            "cursor": self.loader.cursor.to_dict(),
            "tokenizer": {"path": tokenizer, "sha256": manifest.tokenizer_sha256},
        }

    def _fence(self) -> None:
        """Raise Superseded when this life may no longer write; for the first rank alone."""
        if self.lease is not None:
            self.lease.check()
            check_newest(self.saver.folder, self.life)  # other run folders may write there too

    def _check_lease(self) -> None:
        """Raise Superseded on all ranks when a newer life has the run."""
        # Not by the saver's group: a save under way has messages there, in a thread of its own.
        Ranks().first("looking at the lease", self._fence)

    def _check_recorded(self, metrics: MetricLogger) -> None:
        """Raise MachineFailed on all ranks when the run ends because a record was not written."""
        fault = self.saver.ranks.broadcast(None if metrics.fault is None else str(metrics.fault))
        if fault is not None:
            self._write_progress("stopped")
            raise MachineFailed(
                f"writing to run.dir={self.dir} failed: {fault}; the run has saved "
                f"{self.saver.last_good}; make room, and repeat the command"
            )

    def _check_writable(self) -> None:
        """Write the configuration and try out the checkpoint folder, before any step is done."""
        self.saver.ranks.first(
            f"writing to run.dir={self.dir}",
            lambda: save_config(self.config, self.dir / CONFIG_FILE),
            "; use another run.dir",
        )
        self.saver.check_writable()
