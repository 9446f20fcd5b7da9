"""Keys of run files that earlier versions had, and what became of them.

Run files, command lines and the configurations inside checkpoints outlive the version that wrote
them. Whoever reads one asks `update_keys` or `current_keys` first, so a renamed key is still read,
and a removed one is ignored where it said what every run does now. One line says so.

The table lies below the trainer, because a checkpoint's `model:` section is also read without one.
Nothing here imports torch.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from xlstm_io.errors import ConfigError
from xlstm_io.foreign.yaml_file import YAMLTextError, parse_yaml

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OldKey:
    """A key that an earlier version had.

    Attributes:
        new: the key that took its place; None where none did.
        version: the first version without it.
        reason: why, as a sentence.
        default: a removed key's default. A run file that gives this value means today's behaviour.
    """

    new: str | None
    version: str
    reason: str
    default: Any = None


OLD_KEYS: dict[str, OldKey] = {
    "model.rope_base": OldKey(
        new="model.rotary_base", version="0.2.0", reason="Megatron-core uses this name."
    ),
    "engine.tp_comm_overlap": OldKey(
        new=None,
        version="0.2.0",
        reason="It needs TransformerEngine's linear layers, and the blocks have Megatron's own.",
        default=False,
    ),
}


class Updated(NamedTuple):
    """A configuration with today's keys.

    Attributes:
        values: nested values; sections that did not change are the caller's own.
        notes: a line for every renamed key.
        problems: a line for every old key that cannot be read any more.
    """

    values: dict[str, Any]
    notes: list[str]
    problems: list[str]


def update_keys(config: Mapping[str, Any]) -> Updated:
    """Nested values of a run file, of options or of a checkpoint, with today's keys."""
    values, notes, problems = dict(config), [], []
    for old, entry in OLD_KEYS.items():
        section, _, key = old.partition(".")
        keys = values.get(section)
        if not isinstance(keys, Mapping) or key not in keys:
            continue
        values[section] = rest = dict(keys)
        value = rest.pop(key)
        if entry.new is None:
            if _parsed(value) != entry.default:
                shown = str(value).lower() if isinstance(value, bool) else value
                problems.append(
                    f"{old}={shown} was removed in version {entry.version}. {entry.reason} "
                    "Take the key out"
                )
            continue
        new_section, _, new_key = entry.new.partition(".")
        target = rest if new_section == section else dict(values.get(new_section) or {})
        if new_key in target:
            problems.append(f"{old} is an old name of {entry.new}, and both are given; keep one")
            continue
        target[new_key] = value
        values[new_section] = target
        notes.append(f"{old} is read as {entry.new}, its name since version {entry.version}")
    return Updated(values, notes, problems)


def current_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's configuration with today's keys; says which ones were renamed.

    Raises:
        ConfigError: a key asks for what no longer exists.
    """
    updated = update_keys(config)
    if updated.problems:
        raise ConfigError("\n".join(updated.problems))
    say(updated.notes)
    return updated.values


_said: set[str] = set()


def say(notes: Iterable[str]) -> None:
    """Log each note once in a run: only its first process speaks."""
    if os.environ.get("RANK", "0") != "0":
        return
    for note in notes:
        if note not in _said:
            _said.add(note)
            log.warning("%s", note)


def _parsed(value: Any) -> Any:
    """A value from the command line, where everything is text, as a file would hold it."""
    if not isinstance(value, str):
        return value
    try:
        return parse_yaml(value)
    except YAMLTextError:
        return value
