"""Is this checkpoint one of the run that wants to continue from it?"""

from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.config.schema import ModelConfig
from xlstm_io.errors import CheckpointError
from xlstm_mcore.old_keys import current_keys

#: Keys of `model` that do not change what the weights mean: how it is computed, not what.
NOT_IDENTITY = frozenset({"model.chunk_size", "model.kernel_backend", "model.dropout"})

#: What decides which model, which order of data and which tokenizer it is.
SAME_RUN = ("model", "data.seq_len", "run.seed", "tokenizer.sha256", "cursor.plan")

_ABSENT = object()


def check_same_run(
    saved: Mapping[str, Any],
    run: Mapping[str, Any],
    *,
    path: object = "",
    accept: Sequence[str] = (),
) -> None:
    """Refuse a checkpoint of another model, data or tokenizer, showing each key that differs.

    The pipeline cuts (`|`) of a pattern belong to the layout and are ignored, as is `NOT_IDENTITY`.
    A model key that an older version of this program did not have counts as its default.

    Args:
        saved: The resolved configuration of the checkpoint's run (nested mappings with a `model`
            section), together with `tokenizer` and `cursor` of its training state.
        run: The same of the run that wants to continue.
        path: The checkpoint, for the message.
        accept: Keys and sections that may differ.

    Raises:
        CheckpointError: Something else differs.
    """
    saved = current_keys(saved)
    defaults = {k: f.default for k, f in ModelConfig.model_fields.items() if not f.is_required()}
    saved, run = (
        {**whole, "model": {**defaults, **whole.get("model", {})}} for whole in (saved, run)
    )
    check_same(saved, run, SAME_RUN, path=path, accept=accept)


def check_same(
    saved: Mapping[str, Any],
    run: Mapping[str, Any],
    keys: Sequence[str],
    *,
    path: object = "",
    accept: Sequence[str] = (),
) -> None:
    """Compare some values or sections of two nested mappings.

    It serves the configuration and the training state alike, for example
    `check_same(manifest.state, state, ("tokenizer.sha256", "cursor.plan"))`.

    Args:
        saved: The checkpoint's values.
        run: The run's values.
        keys: Dotted keys of what must be the same.
        path: The checkpoint, for the message.
        accept: Keys and sections that may differ: the run says that the change is meant.

    Raises:
        CheckpointError: It lists every difference as `key: checkpoint A, run B`.
    """
    before, now = _flat(saved), _flat(run)
    wanted = [
        name
        for name in dict.fromkeys([*before, *now])
        if _is_in(name, keys) and name not in NOT_IDENTITY and not _is_in(name, accept)
    ]
    differing = {
        name: f"{name}: checkpoint {_text(before, name)}, run {_text(now, name)}"
        for name in wanted
        if before.get(name, _ABSENT) != now.get(name, _ABSENT)
    }
    if differing:
        which = f"the checkpoint {path}" if path else "the checkpoint"
        raise CheckpointError(
            f"{which} belongs to another run; use another run.dir, set what differs back, or, "
            "where the change is meant, continue with checkpoint.accept_changes="
            f"{','.join(differing)}\n  " + "\n  ".join(differing.values())
        )


def _is_in(name: str, keys: Sequence[str]) -> bool:
    """Whether a dotted name is one of `keys` or lies in a section that is."""
    return any(name == key or name.startswith(key + ".") for key in keys)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; the pattern without its pipeline cuts."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        elif isinstance(value, tuple):
            flat[name] = list(value)
        else:
            cut = name == "model.pattern" and isinstance(value, str)
            flat[name] = value.replace("|", "") if cut else value
    return flat


def _text(flat: Mapping[str, Any], name: str) -> str:
    return str(flat[name]) if name in flat else "(none)"
