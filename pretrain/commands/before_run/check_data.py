"""What `check` finds on this machine: the data of a run, its disk, and what it would continue.

It opens everything through the functions that training uses, so it says what a start would say.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pretrain.checkpoint import Ranks, read_manifest
from pretrain.config import RunConfig
from pretrain.config.checks.fields import check_vocabulary
from pretrain.data import DataPlan, TokenDataset, open_plan, open_valid
from pretrain.data.tokenizer_files import tokenizer_files
from pretrain.init_from import described, find_origin
from pretrain.resume import check_continues, curve_of, with_vocab_tokens
from pretrain.run_folder import checkpoints_of
from pretrain.supervision.progress_file import check_nothing_is_lost
from xlstm_io.checkpoint.manifest import newest_first
from xlstm_io.checkpoint.reader import CheckpointReader
from xlstm_io.errors import CheckpointError, ConfigError, UserError
from xlstm_io.storage import absolute
from xlstm_io.terminal import counted
from xlstm_mcore.sizes.parameters import count_parameters

OPTIMIZER_BYTES = 12  # of each parameter: fp32 master weight and two moments
SHOWN = 12  # digits of a hash

T = TypeVar("T")


def describe_data(config: RunConfig, leave_out: str = " (--no-data leaves this out)") -> str:
    """Data, tokenizer, disk and run folder in a few lines.

    Args:
        config: the run.
        leave_out: how the caller can leave this out, for the message.

    Raises:
        ConfigError: something is not as the run needs it; the message lists all of it.
    """
    problems: list[str] = []

    def attempt(part: Callable[[], T]) -> T | None:
        try:
            return part()
        except UserError as error:
            # Training and validation data are often one folder, which is missing once.
            if not any(str(error) in known for known in problems):
                problems.append(str(error))
            return None

    plan = attempt(lambda: open_plan(config.data, config.run.seed))
    lines = [] if plan is None else _training_data(config, plan)
    lines += attempt(lambda: _validation_data(config, plan)) or []
    if plan is not None:
        lines += attempt(lambda: _tokenizer(config, plan)) or []
        lines += attempt(lambda: _run_folder(config, plan)) or []
    lines += attempt(lambda: _disk(config)) or []
    if problems:
        count = counted(len(problems), "problem")
        found = "\n".join(f"  - {message}" for message in problems)
        raise ConfigError(f"{count} with what lies on this machine{leave_out}\n{found}")
    return "\n".join(lines)


def _training_data(config: RunConfig, plan: DataPlan) -> list[str]:
    """The rows of each source, and how often the run sees them."""
    epochs = plan.epochs(config.data.ramp.samples(config.run.steps))
    return [
        f"{'training data' if number == 0 else '':<18}{_dataset(name, dataset)}, "
        f"{epochs[name]:.2f} epochs in the run"
        for number, (name, dataset) in enumerate(zip(plan.names, plan.datasets, strict=True))
    ]


def _validation_data(config: RunConfig, plan: DataPlan | None) -> list[str]:
    sets = open_valid(config.data, plan)
    return [
        f"{'validation' if number == 0 else '':<18}{_dataset(name, dataset)}"
        for number, (name, dataset) in enumerate(sets.items())
    ]


def _dataset(name: str, dataset: TokenDataset) -> str:
    manifest = dataset.manifest
    return (
        f"{f'{name}: ' if name else ''}{dataset.num_rows:,} rows of {manifest.seq_len} in "
        f"{manifest.root}, manifest {manifest.hash[:SHOWN]}"
    )


def _tokenizer(config: RunConfig, plan: DataPlan) -> list[str]:
    manifest = plan.manifest
    check_vocabulary(config, manifest.vocab_size, manifest.root)
    held = "" if tokenizer_files(manifest) else ", which checkpoints will not hold"
    return [
        f"{'tokenizer':<18}{manifest.vocab_size:,} tokens for model.vocab_size="
        f"{config.model.vocab_size}, sha256 {manifest.tokenizer_sha256[:SHOWN]}{held}"
    ]


def _run_folder(config: RunConfig, plan: DataPlan) -> list[str]:
    """What the run would go on from, and what it would change."""
    folder = checkpoints_of(config)
    broken: list[CheckpointError] = []
    try:
        newest = next(newest_first(folder, broken), None)
        passed = [f"{'':<18}passed over: {problem}" for problem in broken]
        # As the trainer does: checkpoints have the number that the run file leaves out.
        tokens, known = plan.manifest.vocab_size, [] if newest is None else [newest]
        config = with_vocab_tokens(config, tokens, known, Ranks())
        if newest is None:
            check_nothing_is_lost(Path(config.run.dir), folder)
            start = f"{'starts':<18}at step 0; {folder} holds no complete checkpoint"
            return [start, *passed, *_init_from(config, plan)]
        saved = read_manifest(newest)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    changes = check_continues(config, plan, newest, saved)
    _, notes = curve_of(config, saved, changes)
    changed = [f"{'':<18}changed since then: {change}" for change in changes]
    return [
        f"{'continues':<18}from step {saved.step} of {config.run.steps}: {newest}",
        *passed,
        *changed,
        *(f"{'':<18}{note}" for note in notes),
    ]


def _init_from(config: RunConfig, plan: DataPlan) -> list[str]:
    """The weights that the run would start from, opened, and what differs from their run."""
    if config.run.init_from is None:
        return []
    path, _, changes = find_origin(config, plan)
    with CheckpointReader(path):  # compares what the manifest says with the files
        pass
    return [
        f"{'':<18}from {described(config, path)}",
        *(f"{'':<18}other than there: {change}" for change in changes),
    ]


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of a checkpoint, about: the weights, and what AdamW keeps of each."""
    weight = 2 if config.engine.precision == "bf16" else 4
    return count_parameters(config.model)["total"] * (weight + OPTIMIZER_BYTES)


def checkpoints_kept(config: RunConfig) -> int:
    """The largest number of checkpoints that lie on the disk at once, one half written included."""
    options, steps = config.checkpoint, config.run.steps
    saves = -(-steps // options.interval)
    kept = options.keep + options.keep_best
    if options.keep_every is not None:
        kept += steps // options.keep_every
    return min(kept + 1, saves)


def _disk(config: RunConfig) -> list[str]:
    """The space that checkpoints need, against what is free; nothing on remote storage."""
    folder = checkpoints_of(config)
    if not isinstance(folder, Path):
        return []
    size, kept = checkpoint_bytes(config), checkpoints_kept(config)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    existing = next(path for path in (absolute(folder), *absolute(folder).parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        why = "may not be written to" if existing.is_dir() else "is not a folder"
        raise ConfigError(f"{folder}: {existing} {why}; set another run.dir or checkpoint.dir")
    free = shutil.disk_usage(existing).free
    needed = max(0, size * kept - there)
    words = f"{kept} checkpoints of {_as_size(size)}"
    if needed > free:
        raise ConfigError(
            f"{folder} has {_as_size(free)} free, and {words} are kept there at once; free "
            f"space, lower checkpoint.keep={config.checkpoint.keep}, or set checkpoint.dir"
        )
    return [f"{'disk':<18}{words} at most; {_as_size(free)} are free"]


def _as_size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
