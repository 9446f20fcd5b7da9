"""Reading and writing run files, and the dotted command-line overrides.

Overrides are merged into the file's values before anything is validated, so that one message can
name everything that is wrong, in the file or on the command line. (tyro, which prints the help
of these options, validates section by section and stops at the first bad one.)
"""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from pretrain.config.checks import problems
from pretrain.config.data_checks import Unreadable
from pretrain.config.schema import RunConfig, Section
from xlstm_io.errors import ConfigError
from xlstm_io.storage import write_atomic

SECTIONS: dict[str, type[Section]] = {
    name: field.annotation for name, field in RunConfig.model_fields.items()
}
FIELDS: dict[str, FieldInfo] = {
    f"{section}.{key}": field
    for section, model in SECTIONS.items()
    for key, field in model.model_fields.items()
}


_SWITCH_WORDS = ("true", "false", "yes", "no", "1", "0", "null", "none")


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(
                    f"line {key_node.start_mark.line + 1}: {key} is given twice; keep one"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# ---------------------------------------------------------------------------------------------
# command line


def _values_taken(key: str) -> int | None:
    """How many values option `key` takes; 0 for a switch, None for an unknown key."""
    field = FIELDS.get(key)
    if field is None:
        return None
    if get_origin(field.annotation) is tuple:
        return len(get_args(field.annotation))
    return 0 if field.annotation in (bool, bool | None) else 1


def list_fields() -> dict[str, FieldInfo]:
    """The keys that hold lists."""
    return {key: field for key, field in FIELDS.items() if get_origin(field.annotation) is list}


def _structure(key: str, value: Any) -> Any:
    """The value of an option whose key holds a list: it is written as in the file, in one line."""
    if key not in list_fields() or not isinstance(value, str):
        return value
    try:
        return yaml.load(value, Loader=_UniqueKeyLoader)
    except yaml.YAMLError:
        return value  # refused by the validation, which says what it must be


def override_option(key: str, value: Any) -> list[str]:
    """The command-line words that set `key` to `value`; the inverse of `split_overrides`."""
    if isinstance(value, (list, tuple)):
        return [f"--{key}", *[str(item) for item in value]]
    if isinstance(value, bool) or value is None:
        return [f"--{key}", {True: "true", False: "false", None: "null"}[value]]
    return [f"--{key}", str(value)]


def split_overrides(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Separate `--section.key value` options from the other words of a command line.

    `--section.key=value` works too; a switch may stand alone (`--layout.sequence`, or
    `--layout.no-sequence` for false); a pair is given as two words (`--optimizer.betas 0.9 0.95`).
    Returns (other words in order, {dotted key: text, list of texts, bool or None}). Unknown keys
    are kept, so that the validation names them together with everything else.
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
            continue
        taken = _values_taken(key)
        if equals:
            values = value.strip("[]()").split(",") if (taken or 1) > 1 else [value]
        elif taken == 0:
            is_value = bool(queue) and queue[0].lower() in _SWITCH_WORDS
            values = [queue.pop(0)] if is_value else ["true"]
        else:
            values = []
            while queue and not queue[0].startswith("--") and len(values) < (taken or 1):
                values.append(queue.pop(0))
            if taken is not None and len(values) < taken:
                wanted = "a value" if taken == 1 else f"{taken} values"
                raise ConfigError(f"--{key} needs {wanted}; write --{key}" + " VALUE" * taken)
        texts = [text.strip() for text in values]
        if (taken or 1) > 1:
            overrides[key] = texts
        else:
            text = texts[0] if texts else ""
            overrides[key] = None if text.lower() in ("null", "none") else text
    return rest, overrides


# ---------------------------------------------------------------------------------------------
# messages


def _suggest(key: str, section: str | None) -> str:
    """`; did you mean ...` for an unknown key, or the list of keys that there are."""
    if section is None:
        close = difflib.get_close_matches(key, SECTIONS, n=1)
        if close:
            return f"did you mean {close[0]}?"
        homes = [dotted for dotted in FIELDS if dotted.endswith(f".{key}")]
        if homes:
            return f"did you mean {homes[0]}?"
        return f"the sections are {', '.join(SECTIONS)}"
    own = list(SECTIONS[section].model_fields)
    homes = [dotted for dotted in FIELDS if dotted.endswith(f".{key}")]
    close = difflib.get_close_matches(key, own, n=1) or [k for k in own if key in k.split("_")]
    if close:
        return f"did you mean {section}.{close[0]}?"
    if homes:
        return f"did you mean {homes[0]}?"
    return f"the keys of {section} are {', '.join(own)}"


def _show(value: Any) -> str:
    """A value as it would stand in the file."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return repr(value)


def _field_message(error: dict[str, Any]) -> str:
    """One line for one pydantic error: key, value, rule, and what the key means."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location[:2])
    kind = error["type"]
    if kind == "missing" and len(location) > 2:
        return f"{_place(location)} is missing; set it"
    if kind == "missing":
        if key in SECTIONS:
            needed = [n for n, f in SECTIONS[key].model_fields.items() if f.is_required()]
            return f"section {key} is missing; it needs at least {', '.join(needed)}"
        return f"{key} is missing; set it ({FIELDS[key].description})"
    if kind == "extra_forbidden" and len(location) > 2:
        model = _item_model(key)
        return (
            f"{_place(location[:-1])} has no {location[-1]}; its keys are "
            f"{', '.join(model.model_fields) if model else 'fixed'}"
        )
    if kind == "extra_forbidden":
        section = location[0] if len(location) > 1 else None
        return f"{key} is no key of a run file; {_suggest(location[-1], section)}"
    if kind == "model_type":
        return f"{key}={_show(error['input'])} must be a section; put its keys below it, indented"
    rule = error["msg"].replace("Input should", "must").split(", unable to")[0]
    if kind == "string_type":
        rule = "must be text; put it into quotes"
    field = FIELDS.get(key)
    about = f" ({field.description})" if field is not None else ""
    return f"{_place(location)}={_show(error['input'])} {rule}{about}"


def _place(location: list[str]) -> str:
    """`data.sources[0].weight` from the parts of a location."""
    words = [f"[{part}]" if part.isdigit() else f".{part}" for part in location[2:]]
    return ".".join(location[:2]) + "".join(words)


def _item_model(key: str) -> type[Section] | None:
    """The section that the items of a list key are."""
    items = get_args(FIELDS[key].annotation) if key in FIELDS else ()
    return items[0] if items and isinstance(items[0], type) else None


class _Partial:
    """Those fields of a broken config that are valid; any other raises `Unreadable`."""

    def __init__(self, values: dict[str, Any]):
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        raise Unreadable(name)


def _valid_part(raw: dict[str, Any]) -> _Partial:
    """Validate field by field what a failed validation left, for the checks between fields."""
    sections = {}
    for section, model in SECTIONS.items():
        given = raw.get(section, {})
        if not isinstance(given, dict):
            continue
        values = {}
        for key, field in model.model_fields.items():
            try:
                if key in given:
                    values[key] = TypeAdapter(
                        Annotated[field.annotation, *field.metadata]
                        if field.metadata
                        else field.annotation
                    ).validate_python(given[key])
                elif not field.is_required():
                    values[key] = field.get_default(call_default_factory=True)
            except ValidationError:
                continue
        sections[section] = _Partial(values)
    return _Partial(sections)


# ---------------------------------------------------------------------------------------------
# reading and writing


def config_from_dict(raw: dict[str, Any], source: str = "config") -> RunConfig:
    """Validate nested values; ConfigError lists every problem, fields and rules between them."""
    found: list[str] = []
    config: Any
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        found = list(dict.fromkeys(_field_message(e) for e in error.errors()))
        config = _valid_part(raw)
    found += problems(config)
    if found:
        lines = "\n".join(f"  - {message}" for message in found)
        count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
        raise ConfigError(f"{source}: {count}\n{lines}")
    return config


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The file's values as nested dicts; ConfigError if it is missing or no YAML mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} does not exist; give the path of a run file, such as "
            "pretrain/configs/cpu_demo.yaml"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text ({error}); give a YAML file") from error
    try:
        raw = yaml.load(text, Loader=_UniqueKeyLoader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} holds no sections; a run file starts with sections such as run:, model:, data:"
        )
    return {str(name): {} if value is None else value for name, value in raw.items()}


def load_config(
    path: str | os.PathLike, overrides: Sequence[str] | dict[str, Any] = ()
) -> RunConfig:
    """Read a run file, put the overrides on top and validate the whole.

    overrides: command-line words (`["--optimizer.lr", "3e-4"]`) or `{"optimizer.lr": 3e-4}`.
    Raises ConfigError (every problem in one message).
    """
    if not isinstance(overrides, dict):
        rest, overrides = split_overrides(overrides)
        if rest:
            raise ConfigError(
                f"{' '.join(rest)}: not understood; overrides look like --optimizer.lr 3e-4"
            )
    raw = read_yaml(path)
    for key, value in overrides.items():
        section, _, leaf = key.partition(".")
        target = raw.setdefault(section, {})
        if isinstance(target, dict):
            target[leaf] = _structure(key, value)
    return config_from_dict(raw, source=str(path))


def save_config(config: RunConfig, path: str | os.PathLike) -> None:
    """Write the resolved config, every key spelt out; `load_config(path)` gives an equal one."""
    text = "# The resolved configuration of this run: every key, defaults included.\n"
    text += yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=4096)
    write_atomic(Path(path), text.encode())
