"""JSON that somebody else may have written: its size is known before it is parsed, then its shape.

    fields = read_json(path, LIMITS.note, error=PrepError)
    note = checked(Note, fields, named_in=path, error=PrepError)

Whatever the bytes are, the outcome is a value of the expected shape or one message.
"""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from xlstm_io.errors import UserError
from xlstm_io.field_errors import key_of, rule_of
from xlstm_io.foreign.untrusted import LIMITS
from xlstm_io.storage import Location, read_file
from xlstm_io.terminal import shortened

Model = TypeVar("Model", bound=BaseModel)


class StrictModel(BaseModel):
    """Base of schemas of our own files: no key too many, and `"5"` and `true` are not numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def parse_json(raw: bytes, *, most_values: int = LIMITS.json_values) -> Any:
    """The value of some bytes of JSON.

    Args:
        raw: the bytes, UTF-8.
        most_values: most values, keys not counted. A value takes up to 120 bytes of memory, and
            as few as two bytes of a file.

    Raises:
        ValueError: they are not JSON, nested too deeply, have too many values, or a number that
            JSON does not have (NaN, Infinity).
    """
    # There are at most as many values as bytes, so most files need no count.
    if len(raw) > most_values and (
        raw.count(b",") + raw.count(b"[") + raw.count(b"{") > most_values
    ):
        raise ValueError(f"it has more than {most_values:,} values")
    try:
        return json.loads(raw, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is not a number of JSON")


def read_json(
    path: Location,
    limit: int,
    *,
    remedy: str = "restore it",
    links: bool = False,
    error: type[UserError] = UserError,
) -> dict[str, Any]:
    """The keys and values of a JSON file.

    Args:
        path: the file.
        limit: most bytes that are read.
        remedy: what to do where it is damaged, for the message.
        links: whether it may be a link.
        error: what is raised.

    Raises:
        FileNotFoundError: it does not exist.
        UserError: of the class `error`: it cannot be read, is too large, or is not a JSON object.
    """
    try:
        raw = read_file(path, limit, links=links)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}") from problem
    try:
        fields = parse_json(raw)
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")
    except ValueError as problem:
        raise error(f"{path} is not valid JSON ({problem}): it is damaged; {remedy}") from None
    return fields


def checked(
    kind: type[Model],
    fields: Any,
    *,
    named_in: Location | str,
    remedy: str = "restore the file",
    error: type[UserError] = UserError,
) -> Model:
    """`fields` as an instance of `kind`, or the first thing that is wrong with them.

    Args:
        kind: the schema.
        fields: what the file says.
        named_in: the file, for the message.
        remedy: what to do, for the message.
        error: what is raised.

    Raises:
        UserError: of the class `error`; the message holds the file, the key, the rule and the
            remedy.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        key = key_of(first["loc"])
        if key and first["type"] not in ("missing", "extra_forbidden"):
            key += f"={shortened(first['input'])}"
        what = f"{key} {rule_of(first)}".strip()
    except RecursionError:
        what = "it is nested too deeply"
    raise error(f"{named_in}: {what}; {remedy}")


@contextmanager
def without_collections() -> Iterator[None]:
    """No search for cycles meanwhile: for objects by the ten thousand, none of which is in one.

    The collector looks at all objects of the process again and again while new ones come; over a
    manifest of 20,000 shards that took longer than their check.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
