"""The settings of a build from its words on the command line, and from the file they may name."""

import difflib
from collections.abc import Sequence
from copy import copy
from dataclasses import field, make_dataclass
from functools import partial
from typing import Annotated, Any

import tyro
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from data_prep.config import BuildConfig, SourceConfig, TextConfig
from data_prep.options import default_hint, parse
from xlstm_io.errors import PrepError
from xlstm_io.field_errors import key_of, rule_of
from xlstm_io.foreign.yaml_file import read_yaml
from xlstm_io.terminal import shortened


def build_options(arguments: list[str], prog: str) -> tuple[BuildConfig, bool]:
    """Settings from `[prep.yaml] [--key value ...]`, and whether functions may be run.

    Flags win over the file. `--allow-functions` is a flag alone: prep.yaml may come from others.

    Raises:
        PrepError: the file or an option is wrong.
    """
    values: dict[str, Any] = {}
    if arguments and not arguments[0].startswith("-"):
        values = read_yaml(arguments[0], of="prep.yaml", example="`seq_len: 256`", error=PrepError)
        if "allow_functions" in values:
            raise PrepError(
                f"{arguments[0]}: allow_functions is not a key of the file, which would allow "
                "itself to run code; remove it and give --allow-functions with the command"
            )
        arguments = arguments[1:]
    description = (
        "Tokenize and pack a corpus into shards. `build prep.yaml --key value`: the keys of the "
        "file are the flags below, and flags win. --check only says whether it can begin."
    )
    parsed = parse(_build_flags(values), arguments, prog, description)
    given = vars(parsed)
    allow_functions = given.pop("allow_functions")
    config = BuildConfig.model_validate({**given, "sources": values.get("sources", [])})
    return config, allow_functions


def _build_flags(values: dict[str, Any]) -> type:
    """The fields of BuildConfig as a plain dataclass with `values` as defaults.

    The command line fills it without pydantic, whose errors would come out in the parser's words;
    the values are validated together afterwards.

    Raises:
        PrepError: some of `values` are wrong (missing ones may come as flags).
    """
    try:
        BuildConfig.model_validate(values)
    except ValidationError as error:
        # What is missing may come as a flag, and with it rules about several keys may be kept.
        later = {(), *((name,) for name in BuildConfig.model_fields)}
        found = error.errors()
        given = [e for e in found if e["loc"] and (e["type"] != "missing" or e["loc"] not in later)]
        if given:
            raise PrepError(explain(given)) from None
    if isinstance(values.get("input"), str):
        values = {**values, "input": [values["input"]]}
    members = []
    # The keys of the build itself first: they begin with those that must be given.
    inherited = TextConfig.model_fields
    for name, info in sorted(BuildConfig.model_fields.items(), key=lambda key: key[0] in inherited):
        if name == "sources":  # for prep.yaml alone
            continue
        own = tyro.MISSING if info.is_required() else info.get_default(call_default_factory=True)
        default = values.get(name, own)
        hint = None if default is tyro.MISSING else default_hint
        shown = tyro.conf.arg(help=info.description, help_behavior_hint=hint)
        kind = Annotated[info.annotation, shown]  # type: ignore[name-defined]
        members.append((name, kind, field(default_factory=partial(copy, default))))
    help_text = "Run the code that filter_functions names."
    allowed = Annotated[bool, tyro.conf.arg(help=help_text)]
    members.append(("allow_functions", allowed, field(default=False)))
    return make_dataclass("BuildFlags", members, kw_only=True)


def explain(errors: Sequence[ErrorDetails]) -> str:
    """All errors of a configuration in one message."""
    parts = []
    for item in errors:
        key = key_of(item["loc"])
        if item["type"] == "extra_forbidden":
            model = SourceConfig if len(item["loc"]) > 1 else BuildConfig
            known = list(model.model_fields)
            close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"
            parts.append(f"{key} is not a setting; {hint}")
        elif item["type"] == "missing":
            parts.append(f"{key} is missing")
        elif not key:  # a rule about several keys
            parts.append(rule_of(item))
        else:
            parts.append(f"{key}={shortened(item['input'])} {rule_of(item)}")
    return "; ".join(dict.fromkeys(parts))
