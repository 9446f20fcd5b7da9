"""Reading and writing run files.

Overrides are merged into the file's values before anything is validated, so that one message can
name everything that is wrong, in the file or on the command line. Rules between fields are checked
once every field is sound.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pretrain.config.checks.fields import problems
from pretrain.config.cuts import with_cuts
from pretrain.config.messages import field_message
from pretrain.config.overrides import parse_structured, put, split_overrides
from pretrain.config.schema import RunConfig
from xlstm_io.errors import ConfigError
from xlstm_io.foreign.yaml_file import read_yaml
from xlstm_io.remote import masked_values
from xlstm_io.storage import write_atomic
from xlstm_io.terminal import counted
from xlstm_mcore.old_keys import Updated, say, update_keys


def config_from_dict(raw: Mapping[str, Any], source: str = "config") -> RunConfig:
    """Validate nested values.

    Args:
        raw: sections by name, each with its keys and values; keys of earlier versions are read too.
        source: where the values come from, for the message.

    Raises:
        ConfigError: every bad field; or, when all fields are sound, every broken rule between them.
    """
    updated = update_keys(raw)
    config = _validated(updated, source)
    say(updated.notes)
    return config


def _validated(updated: Updated, source: str) -> RunConfig:
    found = list(updated.problems)
    try:
        config = RunConfig.model_validate(updated.values)
    except ValidationError as error:
        found += dict.fromkeys(field_message(item) for item in error.errors())
    else:
        found += problems(config)
    if found:
        lines = "\n".join(f"  - {message}" for message in found)
        count = counted(len(found), "problem")
        raise ConfigError(f"{source}: {count}\n{lines}")
    return with_cuts(config)


def _read_sections(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The sections of a run file by name; an empty one has no keys. ConfigError if it is none."""
    raw = read_yaml(path, of="run file", example="run:, model:, data:", error=ConfigError)
    return {name: {} if value is None else value for name, value in raw.items()}


def load_config(
    path: str | os.PathLike,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    quiet: bool = False,
) -> RunConfig:
    """Read a run file, put the overrides on top and validate the whole.

    Args:
        path: the run file.
        overrides: command-line words (`["--optimizer.lr", "3e-4"]`) or `{"optimizer.lr": 3e-4}`.
        quiet: do not say which keys are old; for a launcher, whose workers say it.

    Raises:
        ConfigError: every problem, in one message.
    """
    return _with_overrides(_read_sections(path), overrides, str(path), quiet)


def config_of_checkpoint(
    saved: Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = (), source: str = ""
) -> RunConfig:
    """The run that a checkpoint is of, with overrides on top.

    Args:
        saved: the configuration in the checkpoint's manifest.
        overrides: see `load_config`.
        source: the checkpoint, for messages.

    Raises:
        ConfigError: every problem, in one message.
    """
    return _with_overrides(dict(saved), overrides, source, quiet=False)


def _with_overrides(
    sections: dict[str, Any],
    overrides: Sequence[str] | Mapping[str, Any],
    source: str,
    quiet: bool,
) -> RunConfig:
    """Put overrides on top of a file's sections and validate the whole."""
    if not isinstance(overrides, Mapping):
        rest, overrides = split_overrides(overrides)
        if rest:
            raise ConfigError(
                f"{' '.join(rest)}: not understood; overrides look like --optimizer.lr 3e-4"
            )
    options: dict[str, Any] = {}
    for key, value in overrides.items():
        section, _, leaf = key.partition(".")
        options.setdefault(section, {})[leaf] = parse_structured(key, value)
    # Each by itself, so that a new name on the command line wins over an old one in the file.
    in_file, on_line = update_keys(sections), update_keys(options)
    values = in_file.values
    for section, keys in on_line.values.items():
        if isinstance(values.setdefault(section, {}), dict):
            values[section] = put(values[section], keys)
    notes = list(dict.fromkeys(in_file.notes + on_line.notes))
    config = _validated(Updated(values, notes, in_file.problems + on_line.problems), source)
    if not quiet:
        say(notes)
    return config


def save_config(config: RunConfig, path: str | os.PathLike) -> None:
    """Write every key with its value; `load_config(path)` gives an equal configuration.

    Credentials in URLs are masked, so those are not equal.
    """
    write_atomic(Path(path), _text(config).encode())


def runnable_text(config: RunConfig) -> str:
    """What `save_config` writes, for another process to run.

    Raises:
        ConfigError: URLs have credentials, which a file that others read does not get.
    """
    secret = [
        f"{section}.{key}"
        for section, values in config.model_dump().items()
        for key, value in values.items()
        if masked_values(value) != value
    ]
    if secret:
        raise ConfigError(
            f"{', '.join(secret)}: the URL has credentials, and the job's run file lies in the run "
            "folder, where others can read it; give them in the environment, or in the "
            "configuration of the storage's own package"
        )
    return _text(config)


def _text(config: RunConfig) -> str:
    text = "# The resolved configuration of this run: every key, defaults included.\n"
    return text + yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=4096)
