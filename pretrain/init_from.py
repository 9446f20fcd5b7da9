"""A new run that starts from the weights of a checkpoint: of another run, or of an import.

`run.init_from` counts at the first start of a run, while it has no checkpoint of its own. Which
keys may differ from the checkpoint's stands in `pretrain.config.changes`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pretrain.checkpoint import CheckpointError, Manifest, Ranks, TensorSlice
from pretrain.config import RunConfig
from pretrain.config.changes import Change, Rule, init_changes, refused
from pretrain.data import DataPlan
from pretrain.engines.base import Engine
from pretrain.engines.state import MASTER
from xlstm_io.checkpoint.manifest import OPTIMIZER_PREFIX, parse_manifest, resolve
from xlstm_io.checkpoint.reader import CheckpointReader
from xlstm_io.checkpoint.tokenizer import tokenizer_of
from xlstm_io.errors import UserError
from xlstm_io.storage import Location
from xlstm_io.tokenizer import open_tokenizer


@dataclass(frozen=True)
class Origin:
    """What a run started from.

    Attributes:
        updates: optimizer updates in the moments that were taken along; 0 without them.
        changes: what differs from the checkpoint's configuration and alters what the model is.
        notes: what else a person is told.
    """

    updates: int
    changes: list[Change]
    notes: list[str]


def start_from(config: RunConfig, data: DataPlan, engine: Engine, ranks: Ranks) -> Origin:
    """Load the weights that `run.init_from` names into the engine; called by all ranks.

    Args:
        config: the run.
        data: the order of its data.
        engine: takes the weights, and the optimizer's state with `run.init_optimizer`.
        ranks: who loads together.

    Raises:
        CheckpointError: there is no such checkpoint, it is of another model or tokenizer, or it
            has no optimizer state where that is asked for.
    """
    path, saved, changes = ranks.first(
        f"reading run.init_from={config.run.init_from}", lambda: find_origin(config, data)
    )
    with_optimizer = config.run.init_optimizer
    updates = int(saved.state.get("updates", 0)) if with_optimizer else 0
    engine.load_sharded_state(
        lambda slices: ranks.together(
            f"loading the weights of {path}", lambda: _load(path, slices, with_optimizer)
        ),
        updates,
    )
    return Origin(updates, changes, [f"starting from {described(config, path)}"])


def find_origin(config: RunConfig, data: DataPlan) -> tuple[Location, Manifest, list[Change]]:
    """The checkpoint that `run.init_from` names, its manifest, and what differs from it.

    Args:
        config: the run.
        data: the order of its data.

    Raises:
        CheckpointError: see `start_from`.
    """
    wanted = config.run.init_from
    assert wanted is not None
    path = resolve(wanted)
    saved = parse_manifest(path)
    return path, saved, _check(config, data, path, saved)


def described(config: RunConfig, path: Location) -> str:
    """What a run takes from a checkpoint, as the end of a sentence."""
    state = "with" if config.run.init_optimizer else "without"
    return f"the weights of {path}, {state} its optimizer state"


def _check(config: RunConfig, data: DataPlan, path: Location, saved: Manifest) -> list[Change]:
    """What differs and is said; CheckpointError for what must not differ."""
    now: dict[str, Any] = {
        **config.model_dump(mode="json"),
        "tokenizer": {"sha256": data.manifest.tokenizer_sha256},
    }
    changes = init_changes({**saved.config, "tokenizer": saved.state.get("tokenizer", {})}, now)
    wrong = refused(changes, config.checkpoint.accept_changes)
    if wrong:
        lines = [str(change) for change in wrong]
        names = {change.name for change in wrong}
        if names & {"model.vocab_size", "tokenizer.sha256"}:
            lines += _rows_that_match(data, path, saved)
        asked = [change.name for change in wrong if change.rule is Rule.ASKED]
        remedy = "take the model section and the tokenizer of the checkpoint"
        if len(asked) == len(wrong):
            remedy += f", or, where it is meant, set checkpoint.accept_changes={','.join(asked)}"
        raise CheckpointError(
            f"run.init_from={config.run.init_from}: the weights of {path} are those of another "
            f"model or vocabulary; {remedy}\n  " + "\n  ".join(lines)
        )
    if config.run.init_optimizer:
        _check_optimizer(config, path, saved)
    return [change for change in changes if change.rule is not Rule.FREE]


def _check_optimizer(config: RunConfig, path: Location, saved: Manifest) -> None:
    """Check that a checkpoint has the state of this run's optimizer."""
    if not any(name.startswith(OPTIMIZER_PREFIX) for name in saved.tensors):
        raise CheckpointError(
            f"run.init_optimizer=true, but {path} has no optimizer state; set it to false"
        )
    name = saved.config.get("optimizer", {}).get("name", "adamw")
    if name != config.optimizer.name:
        raise CheckpointError(
            f"run.init_optimizer=true, but {path} has the state of {name} and optimizer.name is "
            f"{config.optimizer.name}; set one of them to the other's"
        )


def _rows_that_match(data: DataPlan, path: Location, saved: Manifest) -> list[str]:
    """Which rows of the embedding mean the same token in the checkpoint and in the data."""
    try:
        before, now = tokenizer_of(path), open_tokenizer(data.manifest.tokenizer_path)
    except UserError as error:
        return [f"which rows of the embedding match is not known: {error}"]
    shared = min(before.vocab_size, now.vocab_size)
    same = [before.token(number) == now.token(number) for number in range(shared)]
    first = same.index(False) if False in same else shared
    return [
        f"of {before.vocab_size} tokens then and {now.vocab_size} now, the first {first} rows are "
        f"the same tokens, and {sum(same)} in all"
    ]


def _load(path: Location, slices: Sequence[TensorSlice], with_optimizer: bool) -> None:
    """Fill this rank's slices; without the optimizer its moments are zero.

    A master weight comes from the checkpoint's own, which has more digits than a bf16 weight, or
    from the weight where there is none, as in an import.
    """
    with CheckpointReader(path, check_files=False) as reader:  # as `find_origin` has done
        for part in slices:
            if not part.tensor.numel():
                continue
            name = part.name.removeprefix(MASTER)
            is_moment = name.startswith(OPTIMIZER_PREFIX)
            if is_moment and not with_optimizer:
                part.tensor.detach().zero_()
                continue
            if not is_moment and part.name not in reader.manifest.tensors:
                part = replace(part, name=name)
            reader.read_into(part)
