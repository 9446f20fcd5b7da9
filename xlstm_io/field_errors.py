"""What pydantic says about a value, in plain words."""

import re
from collections.abc import Mapping
from typing import Any

from xlstm_io.terminal import one_line

# What a value must be, by pydantic's name of the error, where its own words are not plain ones.
_RULES = {
    "missing": "is missing",
    "extra_forbidden": "is not one of the keys",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "has too many digits",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text; put it into quotes",
    "string_too_short": "must not be empty",
    "string_unicode": "must be UTF-8 text",
    "string_pattern_mismatch": (
        "must start with a letter or digit and hold only letters, digits, dots, _ and -"
    ),
    "list_type": "must be a list, such as [a, b]",
    "tuple_type": "must be a list, such as [0.9, 0.95]",
    "dict_type": "must be keys with values, such as {a: 1}",
    "model_type": "must be keys with values, such as {a: 1}",
    "model_attributes_type": "must be keys with values, such as {a: 1}",
    "too_short": "must not be empty",
    "json_invalid": "is not JSON",
}
_DIGITS = re.compile(r"\^\[0-9a-f\]\{(\d+)\}\$")  # the pattern of a hash


def rule_of(error: Mapping[str, Any]) -> str:
    """What the value of a field must be, as the rest of a sentence.

    Args:
        error: an item of `ValidationError.errors()`.
    """
    kind, context = error["type"], error.get("ctx", {})
    if kind == "too_long":
        most = "at most " if context.get("field_type") == "List" else ""
        return f"must have {most}{context['max_length']} values"
    if kind == "less_than_equal":
        return f"must be less than or equal to {context['le']:g}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_pattern_mismatch" and (digits := _DIGITS.fullmatch(context["pattern"])):
        return f"must be {digits[1]} hexadecimal digits"
    words = error["msg"]
    if kind == "literal_error":
        words = f"must be {context['expected']}"
    return _RULES.get(kind) or words.replace("Input should be", "must be")


def key_of(location: tuple[int | str, ...]) -> str:
    """`sources[0].name` from a location of pydantic's."""
    words = [f"[{part}]" if isinstance(part, int) else f".{one_line(part)}" for part in location]
    return "".join(words).removeprefix(".")
