"""Values that nobody would write by accident, put into JSON that is sound otherwise."""

import copy
import random
from typing import Any

VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        [],
        {},
        "",
        0,
        -1,
        1,
        2**31,
        2**53,
        2**62,
        2**63,
        2**80,
        -(2**80),
        10**300,
    ),
    *(0.5, -0.5, 1e308, -1e308, 1e-320, "1", "-1", "NaN", "null", "x" * 5000, "\x1b[2J\x07", "\0"),
    *("../../x", "/etc/passwd", "a/b", "\u202e", "\ud800", [[[[[]]]]], [0] * 9, {"a": {"b": 1}}),
    *(10**300, [-1], ["x"], [None], [[0, 0]], {"": ""}, "M" * 100_000, 1 << 20),
)


def changed(body: Any, rng: random.Random) -> Any:
    """A copy with one to three changes: a hostile value, a missing key, two values swapped."""
    out = copy.deepcopy(body)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(_places(out))
        if not places:  # all has been deleted
            break
        holder, key = rng.choice(places)
        kind = rng.random()
        if kind < 0.15 and isinstance(holder, dict):
            del holder[key]
        elif kind < 0.3:
            other, its = rng.choice(places)
            if key in holder if isinstance(holder, dict) else key < len(holder):
                holder[key], other[its] = copy.deepcopy(other[its]), copy.deepcopy(holder[key])
        elif kind < 0.4 and isinstance(holder[key], int | float):
            holder[key] = holder[key] * rng.choice([-1, 2, 1000]) + rng.choice([-1, 0, 1])
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return out


def _places(value: Any) -> Any:
    """Each (holder, key) of a value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])
