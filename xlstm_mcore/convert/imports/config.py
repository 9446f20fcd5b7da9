"""What a foreign config.json and foreign tensors say about a model, checked as it is read."""

import math
import re
from collections.abc import Mapping
from typing import Any

from xlstm_mcore.checked_model import LARGEST
from xlstm_mcore.convert.errors import ConvertError
from xlstm_mcore.convert.tables import Shape
from xlstm_mcore.settings import ModelConfig
from xlstm_mcore.sizes.dimensions import round_up


class ForeignConfig:
    """Keys of a config.json.

    Args:
        values: what the file holds.
        source: the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], source: object) -> None:
        self.values, self.source = values, source

    def integer(self, *names: str, default: int | None = None) -> int:
        """A positive whole number under the first of some names that is there.

        Raises:
            ConvertError: it is missing, or something else.
        """
        return int(self._number(names, default, whole=True))

    def number(self, *names: str, default: float | None = None) -> float:
        """A positive number; see `integer`."""
        return float(self._number(names, default, whole=False))

    def _number(self, names: tuple[str, ...], default: float | None, whole: bool) -> float:
        name, value = next(
            ((n, self.values[n]) for n in names if self.values.get(n) is not None),
            (names[0], default),
        )
        if value is None:
            raise ConvertError(f"{self.source} has no {names[0]}")
        kinds: tuple[type, ...] = (int,) if whole else (int, float)
        if type(value) not in kinds or not math.isfinite(value) or not 0 < value < LARGEST:
            kind = "whole number" if whole else "number"
            raise ConvertError(f"{self.source}: {name}={value!r} must be a positive {kind}")
        return value

    def must_be(self, name: str, wanted: object) -> None:
        """Refuse another value than the one that we can compute; it may be missing.

        Raises:
            ConvertError: it is another one.
        """
        value = self.values.get(name, wanted)
        if value != wanted:
            raise ConvertError(
                f"{self.source}: {name}={value!r}; only models with {name}={wanted!r} can be "
                "imported exactly"
            )


def shape_of(shapes: Mapping[str, Shape], name: str, dimensions: int) -> Shape:
    """The shape of a tensor that a model must have.

    Raises:
        ConvertError: it is missing, or has another number of dimensions, or one of size 0.
    """
    if name not in shapes:
        raise ConvertError(f"there is no tensor {name}, from which sizes are read")
    shape = shapes[name]
    if len(shape) != dimensions or 0 in shape:
        raise ConvertError(f"{name} has the shape {list(shape)}, which is not one of {dimensions}D")
    return shape


def count_layers(shapes: Mapping[str, Shape], prefix: str) -> int:
    """How many layers tensors are numbered for.

    Args:
        shapes: of the tensors.
        prefix: of a layer's names, with `{n}` for its number.

    Raises:
        ConvertError: there are none, or the numbers have gaps.
    """
    pattern = re.compile(re.escape(prefix).replace(r"\{n\}", r"(\d{1,6})"))
    numbers = {int(found[1]) for name in shapes if (found := pattern.match(name))}
    if not numbers or numbers != set(range(len(numbers))):
        raise ConvertError(
            f"the tensors {prefix.format(n='N')}* are not numbered 0, 1, 2, ...: "
            f"{sorted(numbers)[:8]}"
        )
    return len(numbers)


def width_keys(hidden: int, **widths: int) -> dict[str, Any]:
    """Keys of the `model:` section that give exactly these widths.

    Other programs round another way, so factors are never copied from a file: they follow from the
    widths of the weights.

    Args:
        hidden: width of the residual stream.
        widths: `ffn`, `up`, `slstm_ffn`, `qk` and `v`, as far as the model has them.
    """
    rounded = {name: widths[name] for name in ("ffn", "up", "slstm_ffn") if name in widths}
    multiple = 1 if any(width % 64 for width in rounded.values()) else 64
    keys: dict[str, Any] = {"round_up_to": multiple}
    for name, width in widths.items():
        key = f"{name}_dim_factor"

        def gives(factor: float, name: str = name) -> int:
            exact = hidden * factor
            return round_up(exact, multiple) if name in rounded else int(exact)

        usual, plain = ModelConfig.model_fields[key].default, width / hidden
        # int() cuts off: a quotient that was rounded down needs the next number.
        for factor in (usual, plain, math.nextafter(plain, math.inf)):
            if gives(factor) == width:
                keys[key] = factor
                break
        else:
            raise ConvertError(f"no {key} gives the width {width} at hidden size {hidden}")
    return keys
