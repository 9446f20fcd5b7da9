"""Command-line options that set a key of the run file: `--optimizer.lr 3e-4`.

A key that is a section of its own is set as a whole (`--guard.spikes '{policy: skip}'`), or one of
its keys (`--guard.spikes.policy skip`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from pretrain.config.schema import FIELDS
from xlstm_io.errors import ConfigError
from xlstm_io.foreign.yaml_file import YAMLSyntaxError, YAMLTextError, parse_yaml
from xlstm_mcore.old_keys import OLD_KEYS
from xlstm_mcore.settings import Section

_SWITCH_WORDS = ("true", "false", "yes", "no", "1", "0", "null", "none")


def _field(key: str) -> FieldInfo | None:
    """The field of a dotted key; None for an unknown one."""
    if key in FIELDS:
        return FIELDS[key]
    outer, _, inner = key.rpartition(".")
    section = FIELDS[outer].annotation if outer in FIELDS else None
    if isinstance(section, type) and issubclass(section, Section):
        return section.model_fields.get(inner)
    return None


def _values_taken(key: str) -> int | None:
    """How many words follow option `key`; 0 for a switch, None for an unknown key."""
    old = OLD_KEYS.get(key)
    if old is not None:
        return _values_taken(old.new) if old.new else int(not isinstance(old.default, bool))
    field = _field(key)
    if field is None:
        return None
    if get_origin(field.annotation) is tuple:
        return len(get_args(field.annotation))
    return 0 if field.annotation in (bool, bool | None) else 1


def is_structured(key: str) -> bool:
    """Whether a key holds a list or a mapping: as an option it is written like in the file."""
    field = _field(key)
    if field is None:
        return False
    kind = field.annotation
    return get_origin(kind) in (list, dict) or (
        isinstance(kind, type) and issubclass(kind, Section)
    )


def parse_structured(key: str, value: Any) -> Any:
    """The value of an option; text for a structured key is read as YAML.

    Raises:
        ConfigError: a mapping in the text has a key twice, or the text stands for too many values.
    """
    if not is_structured(key) or not isinstance(value, str):
        return value
    try:
        return parse_yaml(value)
    except YAMLSyntaxError:
        return value  # the validation says what it must be
    except YAMLTextError as error:
        raise ConfigError(f"--{key}: {error}") from None


def put(values: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a section of the file with options on top.

    Args:
        values: the section.
        options: by key; `spikes.policy` is a key inside of `spikes`, and the others stay.
    """
    result = dict(values)
    for name, value in options.items():
        outer, dot, inner = name.partition(".")
        if dot:
            held = result.get(outer)
            value = {**(held if isinstance(held, dict) else {}), inner: value}
        result[outer] = value
    return result


def override_option(key: str, value: Any) -> list[str]:
    """The command-line words that set `key` to `value`; the inverse of `split_overrides`."""
    if is_structured(key) and not isinstance(value, str):
        return [f"--{key}", yaml.safe_dump(value, default_flow_style=True, width=2**20).strip()]
    if isinstance(value, (list, tuple)):
        return [f"--{key}", *[str(item) for item in value]]
    if isinstance(value, bool) or value is None:
        return [f"--{key}", {True: "true", False: "false", None: "null"}[value]]
    return [f"--{key}", str(value)]


def _up_to_the_bracket(queue: list[str]) -> str:
    """Take the words of a list or mapping, which a shell has split at its spaces."""
    words = [queue.pop(0)]
    while queue and not queue[0].startswith("--") and not words[-1].endswith(("]", "}")):
        words.append(queue.pop(0))
    return " ".join(words)


def _take_words(key: str, queue: list[str]) -> list[str]:
    """Take the words of an option's value from the words behind it.

    Raises:
        ConfigError: there are too few.
    """
    taken = _values_taken(key)
    if taken == 0:
        return [queue.pop(0)] if queue and queue[0].lower() in _SWITCH_WORDS else ["true"]
    if queue and queue[0][:1] in ("[", "{") and (is_structured(key) or taken != 1):
        return [_up_to_the_bracket(queue)]
    words: list[str] = []
    while queue and not queue[0].startswith("--") and len(words) < (taken or 1):
        words.append(queue.pop(0))
    if taken is not None and len(words) < taken:
        what = "a value" if taken == 1 else f"{taken} values"
        raise ConfigError(f"--{key} needs {what}; write --{key}" + " VALUE" * taken)
    return words


def _is_null(key: str, text: str) -> bool:
    """Whether the text of an option stands for null: `none` does, unless the key has that value."""
    field = _field(key)
    words = () if field is None else get_args(field.annotation)
    return text.lower() == "null" or (text.lower() == "none" and "none" not in words)


def _value(key: str, words: list[str]) -> str | list[str] | None:
    """What the words of an option say: a text, several of them for a pair, or null."""
    if (_values_taken(key) or 1) > 1:
        words = words[0].strip("[]()").split(",") if len(words) == 1 else words
        return [text.strip() for text in words]
    text = words[0].strip() if words else ""
    return None if _is_null(key, text) else text


def split_overrides(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Separate `--section.key value` options from the other words of a command line.

    `--section.key=value` works too. A switch may stand alone: `--layout.sequence`, or
    `--layout.no-sequence` for false. A pair is two words (`--optimizer.betas 0.9 0.95`) or one in
    brackets (`[0.9, 0.95]`, quoted or not). Unknown keys are kept, so that the validation names
    them together with everything else.

    Returns:
        (other words in order, {dotted key: text, list of texts, bool or None}).

    Raises:
        ConfigError: an option lacks its value.
    """
    rest: list[str] = []
    overrides: dict[str, Any] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        section, dot, leaf = name.partition(".")
        if not word.startswith("--") or not dot:
            rest.append(word)
            continue
        key = f"{section}.{leaf.replace('-', '_')}"
        positive = f"{section}.{leaf.removeprefix('no-').replace('-', '_')}"
        if key != positive and _values_taken(positive) == 0 and not equals:
            overrides[positive] = False
        else:
            overrides[key] = _value(key, [value] if equals else _take_words(key, queue))
    return rest, overrides
