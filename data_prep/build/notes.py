"""Small files of the build state, each with a checksum: one that is not what was written is redone.

`_work` travels with a folder, and disks fail. A flipped bit in a plan would change the next build,
and a stranger's note could name files anywhere. So a note is used only when its checksum is right
and its schema holds; else it is as if it were not there.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from xlstm_io.errors import UserError
from xlstm_io.foreign.json_file import StrictModel, checked, read_json
from xlstm_io.foreign.untrusted import LIMITS
from xlstm_io.new_file import create_new
from xlstm_io.remote import masked_values
from xlstm_io.storage import open_plain, write_atomic

_CHECKSUM = "checksum"
NoteT = TypeVar("NoteT", bound=StrictModel)


def _digest(fields: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(fields, sort_keys=True).encode())


def write_note(path: Path, fields: dict[str, Any], *, sync: bool = True) -> None:
    """Write `fields` and their checksum, atomically; see `storage.write_atomic`."""
    write_atomic(path, _note_bytes(fields), sync=sync)


def create_note(path: Path, fields: dict[str, Any]) -> None:
    """As `write_note`, where there is no note yet.

    Raises:
        FileExistsError: there is one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    create_new(path, _note_bytes(fields))


def _note_bytes(fields: dict[str, Any]) -> bytes:
    """The file. Credentials in URLs are masked: `_work` travels with a folder."""
    fields = masked_values(fields)
    return json.dumps({**fields, _CHECKSUM: _digest(fields)}, indent=1).encode() + b"\n"


def check_note(kind: type[NoteT], path: Path, *, error: type[UserError] = UserError) -> NoteT:
    """The note at `path`. One of an older version has no checksum.

    Raises:
        FileNotFoundError: there is none.
        UserError: of the class `error`: it is not what was written.
    """
    fields = read_json(path, LIMITS.build_state, error=error)
    checksum = fields.pop(_CHECKSUM, None)
    try:
        damaged = checksum is not None and checksum != _digest(fields)
    except RecursionError:
        damaged = True
    if damaged:
        raise error(f"{path} does not match its checksum: it is damaged")
    return checked(kind, fields, named_in=path, remedy="it is damaged", error=error)


def read_note(kind: type[NoteT], path: Path) -> NoteT | None:
    """The note at `path`; None where there is none, or it is not what was written."""
    try:
        return check_note(kind, path)
    except (OSError, UserError):
        return None


def file_hash(path: Path) -> str:
    """xxh3-128 of a file that a note speaks of."""
    with open(open_plain(path), "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
