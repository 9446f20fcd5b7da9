"""Every key of a run file in words: docs/configuration.md, and the options that `--help` lists.

Both come from the schema, so they cannot say anything else than the program does. To renew the
document:

    python -m pretrain.config.reference > docs/configuration.md
"""

import shutil
import textwrap
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from pretrain.config.changes import rules_table
from pretrain.config.messages import choices
from pretrain.config.schema import RunConfig
from xlstm_mcore.old_keys import OLD_KEYS


@dataclass(frozen=True)
class Key:
    """One key of a section, in words.

    Attributes:
        name: the key, without its section.
        type: what it can be, such as `number > 0 or null`.
        default: its default, as a run file would have it; None where the key must be given.
        help: what it means.
    """

    name: str
    type: str
    default: str | None
    help: str


_NAMES = {"integer": "integer", "number": "number", "string": "text", "null": "null"}
_LIMITS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def _spelled(value: Any) -> str:
    """A value as a run file has it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_spelled(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_spelled(v)}' for k, v in value.items())}}}"
    return str(value) if value != "" else "''"


def _type(prop: dict[str, Any], items: dict[str, Any]) -> str:
    """What a value can be, from its JSON schema; `items` are the schemas that it refers to."""
    if "anyOf" in prop:
        return choices([_type(option, items) for option in prop["anyOf"]])
    if "enum" in prop:
        return choices([_spelled(value) for value in prop["enum"]])
    if "$ref" in prop:
        return f"{{{', '.join(items[prop['$ref'].rsplit('/', 1)[-1]]['properties'])}}}"
    kind = prop["type"]
    if kind == "boolean":
        return "true or false"
    if kind == "array" and "prefixItems" in prop:
        return f"[{', '.join(_type(item, items) for item in prop['prefixItems'])}]"
    if kind == "array":
        return f"list of {_type(prop['items'], items)}"
    if kind == "object":
        names = _type(prop["propertyNames"], items) if "propertyNames" in prop else "name"
        return f"{{{names}: {_type(prop['additionalProperties'], items)}}}"
    limits = [f"{sign} {prop[name]:g}" for name, sign in _LIMITS.items() if name in prop]
    return " ".join([_NAMES[kind], " and ".join(limits)]).strip()


def _keys(schema: dict[str, Any], items: dict[str, Any]) -> list[Key]:
    """The keys of one section."""
    required = schema.get("required", ())
    keys = []
    for name, prop in schema["properties"].items():
        empty: Any = [] if prop.get("type") == "array" else {}
        default = None if name in required else _spelled(prop.get("default", empty))
        keys.append(Key(name, _type(prop, items), default, prop.get("description", "")))
    return keys


def sections() -> Iterator[tuple[str, str, list[Key]]]:
    """Name, purpose and keys of every section, of sections in them, and of items of their lists."""
    whole = RunConfig.model_json_schema()
    definitions = whole["$defs"]
    for name, prop in whole["properties"].items():
        section = definitions[prop["$ref"].rsplit("/", 1)[-1]]
        yield name, section["description"], _keys(section, definitions)
        for key, inner in section["properties"].items():
            if "$ref" in inner:
                item = definitions[inner["$ref"].rsplit("/", 1)[-1]]
                yield f"{name}.{key}", item["description"], _keys(item, definitions)
            if "$ref" in inner.get("items", {}):
                item = definitions[inner["items"]["$ref"].rsplit("/", 1)[-1]]
                yield f"{name}.{key}[]", item["description"], _keys(item, definitions)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def markdown() -> str:
    """The text of docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "<!-- Written by `python -m pretrain.config.reference`; do not edit. -->",
        "",
        "A run file is YAML with the sections below. Keys without a default must be given.",
        "",
        "Every key is also an option of the commands that read a run file: `--optimizer.lr 3e-4`.",
        "Lists and mappings are written as in the file, in one line:",
        "`--optimizer.decay '{norm: true}'`. A key of a section inside a section has all three",
        "names: `--guard.spikes.policy skip`. `evaluate` takes the keys that say what is measured.",
        "",
        "`python -m pretrain check RUN.yaml --no-data` says everything that is wrong with a file.",
        "Without `--no-data` it opens the data and the run folder as well, and compares the free",
        "disk with what the checkpoints will take.",
        "`python -m pretrain check RUN.yaml --help` lists every key with its value.",
        "",
        "[One table](#what-may-change) says what may change in mid-run, and",
        "[another](from-megatron.md#which-key-is-my-flag) which key is a flag of other trainers.",
    ]
    for name, purpose, keys in sections():
        title = f"## `{name}:`"
        if "." in name:
            title = f"### An item of `{name[:-2]}`" if name.endswith("[]") else f"### `{name}`"
        lines += ["", title, "", purpose, "", _row("key", "type", "default", "meaning")]
        lines.append("|---|---|---|---|")
        for key in keys:
            default = "**required**" if key.default is None else f"`{key.default}`"
            lines.append(_row(f"`{key.name}`", f"`{key.type}`", default, key.help))
    lines += ["", "## What may change", ""]
    lines += [
        "On a resume: the same run continues from its newest checkpoint. On an init_from: another",
        "run starts from a checkpoint's weights. What is said is printed when the run starts, and",
        "stands in the run folder's `history.jsonl`. What must be accepted is listed when the run",
        "stops for it; `checkpoint.accept_changes` names it. `section.*` stands for the other keys",
        "of a section.",
        "",
        _row("key", "on a resume", "on an init_from", "why"),
        "|---|---|---|---|",
        *(_row(*row) for row in rules_table()),
    ]
    lines += ["", "## Keys of earlier versions", ""]
    lines += [
        "A renamed key is still read, and one line says so. A removed key is read where it has the",
        "value that every run has now; any other value is an error.",
        "",
        _row("key", "now", "since", "reason"),
        "|---|---|---|---|",
    ]
    for old, entry in OLD_KEYS.items():
        now = f"`{entry.new}`" if entry.new else f"removed; `{_spelled(entry.default)}` is read"
        lines.append(_row(f"`{old}`", now, entry.version, entry.reason))
    return "\n".join(lines) + "\n"


def options_help(config: RunConfig, only: Collection[str] = ()) -> str:
    """Keys as command-line options, with their values in `config`.

    Args:
        config: the values.
        only: the dotted keys to list; none for all.
    """
    width = min(shutil.get_terminal_size().columns, 100)
    values = config.model_dump(mode="json")
    lines = []
    for name, purpose, keys in sections():
        if only:
            keys = [key for key in keys if f"{name}.{key.name}" in only]
        if "." in name or not keys:
            continue
        lines += ["", f"{name}: {purpose}"]
        for key in keys:
            lines.append(f"  --{name}.{key.name}  {key.type}")
            text = f"{key.help} (now {_spelled(values[name][key.name])})"
            lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines).lstrip("\n")


if __name__ == "__main__":
    print(markdown(), end="")
