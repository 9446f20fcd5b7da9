"""What a file that somebody else wrote may say: names inside its own folder, and a size in bounds.

Shards and checkpoints are copied from strangers. Their manifests name other files, and those names
are read, and by `merge`, `repack` and the cache of remote shards also written. So a name is only
used when it stays inside the folder of the file that says it, and nothing is read whole before
its size is known to be sane.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from xlstm_io.errors import UserError
from xlstm_io.remote import RemotePath
from xlstm_io.storage import Location

LocationT = TypeVar("LocationT", Path, RemotePath)


@dataclass(frozen=True)
class Limits:
    """The most bytes of each kind of file that is read whole; docs/security.md has the table.

    Attributes:
        checkpoint_json: `manifest.json` and `metadata.json` of a checkpoint; hundreds of times
            what a 7B model needs.
        shard_manifest: `manifest.json` of a shard folder; about 400 bytes for each shard.
        shard_index: `.idx.npz` of one shard; 56 bytes for each MiB of it.
        shard_block: one member of a shard's tar; a block has about 1 MiB.
        tokenizer: a SentencePiece model, a `tokenizer.json` or its `tokenizer_config.json`.
        yaml: a run file, or a file of `data_prep build`.
        note: a small JSON file: `SOURCE.json`, `state.json` of a dataset, a record of a shard.
        build_state: `build.json` and the plans in `OUT/_work`; twice the name of each input file.
        json_values: values of one JSON file (not bytes), so a manifest of 700,000 shards.
    """

    checkpoint_json: int = 1 << 28
    shard_manifest: int = 1 << 28
    shard_index: int = 1 << 28
    shard_block: int = 1 << 28
    tokenizer: int = 1 << 28
    yaml: int = 1 << 20
    note: int = 1 << 20
    build_state: int = 1 << 28
    json_values: int = 8_000_000


LIMITS = Limits()


def check_name(
    name: object, *, named_in: Location | str, error: type[UserError] = UserError
) -> str:
    """A file name that a file says, if it is relative and normalised.

    Args:
        name: what the file says.
        named_in: the file that says it, for the message.
        error: what is raised.

    Raises:
        UserError: of the class `error`; the message holds the name, the rule and the file.
    """
    rule = _broken_rule(name)
    if rule:
        shown = repr(name) if len(repr(name)) <= 200 else f"{repr(name)[:200]}..."
        raise error(
            f"{named_in} names a file outside its folder: {shown} ({rule}); do not use this copy "
            "unless you know who changed it"
        )
    assert isinstance(name, str)
    return name


def check_names(
    names: Sequence[str], *, named_in: Location | str, error: type[UserError] = UserError
) -> None:
    """As `check_name` for each, and faster: a manifest may name tens of thousands of files.

    The parts of all names are those of one long name, so one look finds whether any is bad.

    Args:
        names: what the file says.
        named_in: the file that says it, for the message.
        error: what is raised.

    Raises:
        UserError: of the class `error`, for the first name that breaks a rule.
    """
    if _broken_rule("/".join(names)):
        for name in names:
            check_name(name, named_in=named_in, error=error)


def _broken_rule(name: object) -> str:
    """The rule that a name breaks; empty if it keeps them all."""
    if not isinstance(name, str) or not name:
        return "a name is a text that is not empty"
    if name.startswith("/"):
        return "a name must be relative"
    if any(part in f"/{name}/" for part in ("//", "/./", "/../")):
        return "a name must have no empty part, no . and no .."
    if "\0" in name or (
        not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name)
    ):
        return "a name must be text that a file system can hold"
    return ""


def inside(
    root: LocationT,
    name: object,
    *,
    named_in: Location | str,
    error: type[UserError] = UserError,
) -> LocationT:
    """The place of a file that a file in `root` names.

    The name must be relative and normalised, and no link may lead from it out of `root`; links
    inside are followed. The file need not exist. The answer is `root / name`, links unresolved.

    Args:
        root: the folder that the name is relative to.
        name: what the file says.
        named_in: the file that says it, for the message.
        error: what is raised.

    Raises:
        UserError: of the class `error`; the message holds the name, the rule and the file.
    """
    text = check_name(name, named_in=named_in, error=error)
    if isinstance(root, RemotePath):
        if "::" in text:
            raise error(f"{named_in} names a file outside its folder: {text!r} (no :: in a URL)")
        return root / text
    # `realpath`, because it follows a link into a loop without an error.
    real, base = os.path.realpath(root / text), os.path.realpath(root)
    if os.path.commonpath([real, base]) != base:
        raise error(
            f"{named_in} names a file outside its folder: {text!r} (a link leads to {real}); put "
            "the file itself there"
        )
    return root / text
