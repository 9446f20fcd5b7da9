"""Is this checkpoint one of the run that wants to continue from it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.checkpoint.errors import CheckpointError

#: Keys of `model` that do not change what the weights mean: how it is computed, not what.
NOT_IDENTITY = frozenset({"model.chunk_size", "model.kernel_backend", "model.dropout"})

#: Sections of the run configuration that decide which model and which order of data it is.
SAME_RUN = ("model", "data.seq_len", "run.seed")

_ABSENT = object()


def check_same_model(
    saved_config: Mapping[str, Any], config: Mapping[str, Any], *, path: Path | str = ""
) -> None:
    """Refuse a checkpoint of another model or data order, showing each key that differs.

    Both arguments are resolved run configurations (nested mappings with a `model` section). The
    pipeline cuts (`|`) of a pattern belong to the layout and are ignored, as is `NOT_IDENTITY`.
    Raises CheckpointError.
    """
    check_same(saved_config, config, SAME_RUN, path=path)


def check_same(
    saved: Mapping[str, Any],
    run: Mapping[str, Any],
    keys: Sequence[str],
    *,
    path: Path | str = "",
) -> None:
    """Compare the dotted `keys` (values or whole sections) of two nested mappings.

    Works for the configuration and for the training state alike, for example
    `check_same(manifest.state, state, ("tokenizer.sha256", "cursor.manifest_hash"))`.
    Raises CheckpointError listing every difference as `key: checkpoint A, run B`.
    """
    before, now = _flat(saved), _flat(run)
    wanted = [
        name
        for name in dict.fromkeys([*before, *now])
        if any(name == key or name.startswith(key + ".") for key in keys)
        and name not in NOT_IDENTITY
    ]
    differing = [
        f"{name}: checkpoint {_text(before, name)}, run {_text(now, name)}"
        for name in wanted
        if before.get(name, _ABSENT) != now.get(name, _ABSENT)
    ]
    if differing:
        raise CheckpointError(
            f"the checkpoint {path} belongs to another run; use another run.dir, or set what "
            "differs back:\n  ".replace("  belongs", " belongs")
            + "\n  ".join(differing)
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; the pattern without its pipeline cuts."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        elif name == "model.pattern" and isinstance(value, str):
            flat[name] = value.replace("|", "")
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def _text(flat: Mapping[str, Any], name: str) -> str:
    return str(flat[name]) if name in flat else "(none)"
