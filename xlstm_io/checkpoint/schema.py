"""What the JSON of a checkpoint may say: types and bounds of every value that a program uses.

A value that is not checked here is used by nobody, or by a schema of its own: the configuration by
`pretrain.config`. Keys that are not named are left as they are, since another version may use them.
"""

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from xlstm_io.checkpoint.safetensors_stream import DTYPES
from xlstm_io.terminal import shortened

Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Bytes = Annotated[int, Field(ge=0, lt=1 << 50)]
Seconds = Annotated[float, Field(ge=0, lt=1e15)]
Text = Annotated[str, Field(max_length=4096)]


_ABSENT: Any = None
"""Default of a key that may be missing, and is not null where it is there."""
_SECTIONS = ("run", "model", "layout", "engine", "data", "optimizer", "schedule", "checkpoint")


def parse_sizes(values: Any) -> tuple[int, ...]:
    """A shape or offset from JSON.

    Raises:
        ValueError: It is not a list of at most eight sizes.
    """
    if not isinstance(values, list) or len(values) > 8:
        raise ValueError(f"{shortened(values)} is not a shape")
    if not all(type(v) is int and 0 <= v < 1 << 48 for v in values):
        raise ValueError(f"{shortened(values)} is not a shape")
    if math.prod(values) >= 1 << 62:
        raise ValueError(f"{shortened(values)} is not a shape")
    return tuple(values)


def _shape(values: list[int]) -> list[int]:
    parse_sizes(values)
    return values


def _dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"must be one of {', '.join(DTYPES)}")
    return name


def _sections(config: dict[str, Any]) -> dict[str, Any]:
    for name in _SECTIONS:
        if not isinstance(config.get(name, {}), dict):
            raise ValueError(f"must have keys and values in its section {name}")
    return config


class _Values(BaseModel):
    """No `"5"` or `true` for a number, no NaN; other keys stay."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)


class FileEntry(_Values):
    """A file of the checkpoint."""

    size: Bytes
    xxh3: Text


class TensorEntry(_Values):
    """A global tensor."""

    shape: Annotated[list[int], AfterValidator(_shape)]
    dtype: Annotated[str, AfterValidator(_dtype)]


class _DamagedRow(_Values):
    model_config = ConfigDict(extra="forbid")

    sample: Count
    source: Text
    row: Count
    path: Text
    block: Count | None
    offset: Count
    expected: Text
    got: Text


class _Cursor(_Values):
    consumed_samples: Count
    plan: dict[str, Any] = Field(default_factory=dict)
    quarantined: list[_DamagedRow] = Field(default_factory=list)
    skipped: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] = Field(
        default_factory=list
    )


class _Turn(_Values):
    model_config = ConfigDict(extra="forbid")

    at: Count
    end: Count
    pace: Annotated[float, Field(ge=0)]
    """0 where the curve had ended and its last rate is held."""


class _Curve(_Values):
    steps: Annotated[int, Field(ge=1, lt=1 << 62)]
    turns: list[_Turn]


class _Divergence(_Values):
    losses: list[float] = Field(default_factory=list)
    norms: list[float] = Field(default_factory=list)
    skipped: Count = 0
    onset: Count | None = None
    last: Count | None = None


class _Tokenizer(_Values):
    path: Text | None = None
    sha256: Text | None = None


class State(_Values):
    """The training state, as far as a checkpoint has it: versions differ, and imports have less."""

    step: Count = _ABSENT
    updates: Count = 0
    tokens: Count = 0
    seconds: Seconds = 0.0
    loss: float | None = None
    interval_loss: float = 0.0
    interval_tokens: Count = 0
    life: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    evaluation_due: bool = False
    valid_loss: float | None = None
    valid_step: Count | None = None
    cursor: _Cursor = _ABSENT
    curve: _Curve = _ABSENT
    divergence: _Divergence = _ABSENT
    tokenizer: _Tokenizer = _ABSENT
    imported: dict[str, Any] = _ABSENT
    provenance: dict[str, Any] = _ABSENT


class ManifestBody(_Values):
    """`manifest.json`."""

    step: Annotated[int, Field(ge=0, lt=10**18)]
    created: Annotated[float, Field(ge=0, lt=1e11)]
    """Seconds since 1970, before the year 5138."""
    files: dict[Any, FileEntry]  # their names have a rule of their own
    tensors: dict[Text, TensorEntry]
    state: State
    config: Annotated[dict[str, Any], AfterValidator(_sections)]
    versions: dict[Text, Text]
    checksum: Text
