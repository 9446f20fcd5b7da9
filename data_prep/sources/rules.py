"""Rules on the other fields of a record: language, score, licence, as datatrove notes them.

A rule is written in `prep.yaml`, under `keep` of a source: `metadata.language: [en, de]`, or
`metadata.language_score: {min: 0.65}`. A record is kept where every rule holds. A field that is not
there holds no value, so no rule keeps it, unless null is listed.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Scalar = bool | int | float | str | None


@dataclass(frozen=True)
class FieldRule:
    """What the value of a field must be.

    Attributes:
        field: its name; `a.b` is the field `b` within the field `a`.
        one_of: the values that are kept; None: all.
        none_of: the values that are not.
        min: smallest number.
        max: largest number.
    """

    field: str
    one_of: tuple[Scalar, ...] | None = None
    none_of: tuple[Scalar, ...] = ()
    min: float | None = None
    max: float | None = None

    def keeps(self, value: Any) -> bool:
        """Whether a record with this value is kept."""
        if self.one_of is not None:
            return _among(value, self.one_of)
        if value is None or _among(value, self.none_of):
            return False
        if self.min is None and self.max is None:
            return True
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low = -float("inf") if self.min is None else self.min
        high = float("inf") if self.max is None else self.max
        return low <= value <= high  # not a number lies nowhere


def _among(value: Any, values: tuple[Scalar, ...]) -> bool:
    """Whether `value` is one of `values`; true is not 1."""
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in values
    )


class Bounds(BaseModel):
    """A rule that is not a list of values."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    min: float | None = None
    """Smallest number."""
    max: float | None = None
    """Largest number."""
    none_of: list[Scalar] = Field(default_factory=list)
    """Values that are not kept."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.min is None and self.max is None and not self.none_of:
            raise ValueError("give min, max or none_of")
        _check_words(self.none_of)
        return self


def _as_list(value: Any) -> Any:
    values = value if isinstance(value, list | dict | Bounds) else [value]
    if isinstance(values, list):
        _check_words(values)
    return values


def _check_words(values: list[Any]) -> None:
    """YAML reads the word no, Norwegian in lists of languages, as false."""
    kinds = {type(value) for value in values}
    if bool in kinds and str in kinds:
        raise ValueError("words and true or false are mixed; quote words such as 'no'")


Rule = Annotated[list[Scalar] | Bounds, BeforeValidator(_as_list)]
"""A value or a list of values that are kept, or `Bounds`."""


def field_rule(field: str, rule: list[Scalar] | Bounds) -> FieldRule:
    """The rule that the settings state for a field."""
    if isinstance(rule, Bounds):
        return FieldRule(field, None, tuple(rule.none_of), rule.min, rule.max)
    return FieldRule(field, tuple(rule))
