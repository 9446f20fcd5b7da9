"""Where a run stands, and how it continues from its newest checkpoint."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.checkpoint import (
    Candidates,
    CheckpointDamagedError,
    CheckpointError,
    CheckpointSaver,
    Manifest,
    Ranks,
    check_same_run,
    load_checkpoint,
    read_evaluation_together,
    read_manifest_together,
)
from pretrain.config import RunConfig, micro_batches
from pretrain.config.changes import Change
from pretrain.data import DataCursor, DataPlan, Quarantine, TrainLoader
from pretrain.engines.base import Engine
from pretrain.engines.verdict import StepResult
from pretrain.guard.divergence import Divergence
from pretrain.init_from import start_from
from pretrain.layout import Layout
from pretrain.lr_curve import Curve, continued
from pretrain.supervision.progress_file import check_nothing_is_lost
from xlstm_io.checkpoint.evaluation import Evaluation
from xlstm_io.checkpoint.lives import Lives
from xlstm_io.errors import ConfigError
from xlstm_io.storage import Location

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """Where a run stands, the same on every rank and every layout.

    Attributes:
        step: finished steps.
        updates: finished steps whose update was applied (Adam's bias correction counts these).
        tokens: unmasked tokens trained on.
        seconds: wall-clock seconds spent in steps.
        loss: of the last step, nats per token; None where it was not finite, or not known.
        interval_loss: mean loss of the applied steps since the last log line, nats per token.
        interval_tokens: how many tokens that is the mean of.
        interval_sources: the same steps by source, where several are told apart: the sum of the
            losses and the number of tokens.
    """

    step: int = 0
    updates: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    interval_loss: float = 0.0
    interval_tokens: int = 0
    interval_sources: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @classmethod
    def saved_in(cls, manifest: Manifest) -> "TrainState":
        """The state that a checkpoint was saved with; those of 0.1.0 have no losses."""
        names = [f.name for f in fields(cls) if f.name in manifest.state]
        return cls(**{name: manifest.state[name] for name in names})

    def after(
        self, result: StepResult, seconds: float, sources: Sequence[str] = ()
    ) -> "TrainState":
        """The state after one more step.

        Args:
            result: of the step.
            seconds: how long it took.
            sources: names of the sources that the result tells apart.
        """
        mean, tokens = self.interval_loss, self.interval_tokens
        by_source = {**self.interval_sources}
        if result.accepted:
            tokens += result.tokens
            # So that the mean of one step is its loss to the last digit.
            mean += (result.loss - mean) * (result.tokens / max(tokens, 1))
            for name, (loss, number) in zip(sources, result.sources, strict=True):
                before = by_source.get(name, (0.0, 0))
                by_source[name] = (before[0] + loss, before[1] + number)
        return TrainState(
            step=self.step + 1,
            updates=self.updates + result.accepted,
            tokens=self.tokens + result.tokens,
            seconds=self.seconds + seconds,
            loss=result.loss if math.isfinite(result.loss) else None,
            interval_loss=mean,
            interval_tokens=tokens,
            interval_sources=by_source,
        )

    def logged(self) -> "TrainState":
        """The state after a log line: the mean loss begins anew."""
        return replace(self, interval_loss=0.0, interval_tokens=0, interval_sources={})


@dataclass(frozen=True)
class Start:
    """What a process of a run starts from.

    Attributes:
        state: where the run stands.
        cursor: where it stands in its data.
        checkpoint: the checkpoint that the engine was loaded from; None for a fresh start.
        curve: the learning-rate curve.
        divergence: what is known of the steps before.
        changes: what differs from the checkpoint's configuration and alters the result.
        notes: what else a person is told about the resume.
        evaluation: what was measured of that checkpoint; None if nothing was.
    """

    state: TrainState
    cursor: DataCursor
    checkpoint: Location | None
    curve: Curve
    divergence: Divergence
    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    evaluation: Evaluation | None = None


def with_vocab_tokens(
    config: RunConfig, tokens: int, checkpoints: Iterable[Location], ranks: Ranks
) -> RunConfig:
    """The run with `model.vocab_tokens` filled in where its file leaves it out.

    A new run gives no logit to rows of the vocabulary without a token. A run that continues does
    what it did: those of version 0.1 gave every row one.

    Args:
        config: the run.
        tokens: number of tokens that the data's tokenizer has.
        checkpoints: those that the run may continue from, newest first.
        ranks: all ranks of the run.
    """
    if config.model.vocab_tokens is not None:
        return config
    found = tokens if tokens < config.model.vocab_size else None
    for path in checkpoints:
        try:
            saved = read_manifest_together(path, ranks=ranks)
        except CheckpointDamagedError:
            continue  # `resume` names it
        found = saved.config.get("model", {}).get("vocab_tokens")
        break
    model = config.model.model_copy(update={"vocab_tokens": found})
    return config.model_copy(update={"model": model})


def resume(
    config: RunConfig,
    data: DataPlan,
    engine: Engine,
    saver: CheckpointSaver,
    candidates: Candidates,
) -> Start:
    """Load the newest sound checkpoint of the run into the engine, or what the run starts from.

    Called by all ranks. A damaged checkpoint is named and passed over, and `saver` is told not to
    delete it.

    Args:
        config: the run.
        data: the order of its data.
        engine: takes the checkpoint's weights and optimizer state.
        saver: of the run's checkpoint folder.
        candidates: its checkpoints, newest first; the same on every rank.

    Raises:
        CheckpointError: there are checkpoints and none of them is sound, the newest sound one
            belongs to another run, or the run has had checkpoints and none is found.
        ConfigError: the checkpoint has done more steps than the run is to have.
    """
    ranks = saver.ranks
    for path in candidates:
        try:
            saved = read_manifest_together(path, ranks=ranks)
            changes = check_continues(config, data, path, saved)
            state = TrainState.saved_in(saved)
            curve, notes = curve_of(config, saved, changes)
            engine.load_sharded_state(
                lambda slices, path=path: load_checkpoint(path, slices, ranks=ranks), state.updates
            )
        except CheckpointDamagedError as error:
            if ranks.is_first:
                log.warning("passing over a broken checkpoint: %s", error)
            saver.damaged.add(path)
            continue
        saver.last_good = path
        measured = read_evaluation_together(path, saved, ranks=ranks)
        cursor = DataCursor.from_dict(saved.state["cursor"])
        skip = ranks.first("looking for a rewind", partial(_to_skip, saver.folder, saved))
        if skip:
            first, cursor = cursor.consumed_samples, cursor.skip(skip)
            notes.append(f"rewound: the samples {first} to {first + skip - 1} are left out")
        divergence = Divergence(config, saved.state.get("divergence"))
        return Start(state, cursor, path, curve, divergence, changes, notes, measured)
    if candidates:
        raise CheckpointError(
            f"none of the {len(list(candidates))} checkpoints in {saver.folder} is sound; move "
            "them away to start anew"
        )
    folder = Path(config.run.dir)
    ranks.first(
        "looking at what the run had done", lambda: check_nothing_is_lost(folder, saver.folder)
    )
    return _first_start(config, data, engine, ranks)


def _first_start(config: RunConfig, data: DataPlan, engine: Engine, ranks: Ranks) -> Start:
    """Step 0, with initial weights or those that `run.init_from` names."""
    start = Start(TrainState(), DataCursor(0), None, Curve(config.run.steps), Divergence(config))
    if config.run.init_from is None:
        return start
    origin = start_from(config, data, engine, ranks)
    state = TrainState(updates=origin.updates)
    return replace(start, state=state, changes=origin.changes, notes=origin.notes)


def open_loader(config: RunConfig, layout: Layout, plan: DataPlan, start: Start) -> TrainLoader:
    """The loader of this process's part in the steps to come.

    Args:
        config: the run.
        layout: where this process stands.
        plan: the order of the run's data.
        start: what this process starts from.
    """
    data, cursor = config.data, start.cursor
    file = layout.own_file(Path(config.run.dir), "quarantine")
    return TrainLoader(
        plan,
        data.ramp,
        micro_batch=data.micro_batch,
        step=start.state.step,
        consumed_samples=cursor.consumed_samples,
        skipped=cursor.skipped,
        workers=data.workers,
        quarantine=Quarantine(data.max_quarantined, file, cursor.quarantined),
        dp_rank=layout.dp_rank,
        dp_size=layout.dp_size,
        micro_batches=lambda rows: micro_batches(config, layout.dp_size, rows),
    )


def _to_skip(folder: Location, saved: Manifest) -> int:
    """Samples that a rewind leaves out after a checkpoint."""
    return Lives(folder).samples_to_skip(saved.state.get("life", 0), saved.step)


def check_continues(
    config: RunConfig, data: DataPlan, path: Location, saved: Manifest
) -> list[Change]:
    """Check that a checkpoint is of this run's model, data and tokenizer, and not of a longer run.

    Returns:
        What differs and alters the result.

    Raises:
        CheckpointError: it is of another model, data or tokenizer.
        ConfigError: it has done more steps than the run is to have.
    """
    if "imported" in saved.state:
        raise CheckpointError(
            f"{path} is an import, from which a run starts and does not continue; set "
            f"run.init_from={path.parent.parent} and another run.dir"
        )
    if saved.state.get("step", saved.step) != saved.step:
        raise CheckpointDamagedError(
            f"{path}: state.step={saved.state['step']} is not the step {saved.step} of its manifest"
        )
    if "cursor" not in saved.state:
        raise CheckpointDamagedError(f"{path} does not say how much data its run has consumed")
    consumed = DataCursor.from_dict(saved.state["cursor"]).consumed_samples
    now: dict[str, Any] = {
        **config.model_dump(mode="json"),
        "tokenizer": {"sha256": data.manifest.tokenizer_sha256},
        "cursor": {"plan": data.describe(consumed)},
    }
    accept = config.checkpoint.accept_changes
    changes = check_same_run({**saved.config, **saved.state}, now, path=path, accept=accept)
    if saved.step > config.run.steps:
        raise ConfigError(
            f"run.steps={config.run.steps}, but {path} has done {saved.step} steps already; set "
            f"run.steps to at least {saved.step}, or use another run.dir"
        )
    return changes


def curve_of(config: RunConfig, saved: Manifest, changes: list[Change]) -> tuple[Curve, list[str]]:
    """The learning-rate curve of a run that continues, and what is said about it.

    Raises:
        ConfigError: the rate would be 0 from here on.
    """
    changed = {change.name for change in changes}
    steps = config.run.steps
    if any(name.startswith("schedule.") for name in changed):
        return Curve(steps), ["the section schedule has changed: its curve is computed anew"]
    before = saved.config.get("run", {}).get("steps", steps)
    if type(before) is not int or before < 1:
        raise CheckpointDamagedError(f"step {saved.step}: its config says run.steps={before!r}")
    # Checkpoints of version 0.1 do not know of curves; no run of that version had a turn in it.
    known = saved.state.get("curve")
    curve = Curve(before) if known is None else Curve.from_dict(known)
    if steps == before:
        return curve, []
    curve, note = continued(
        curve, config.optimizer, config.schedule, done=saved.step, before=before, steps=steps
    )
    return curve, [note]
