"""The tasks once more, by their definitions: one sample at a time, on its symbols."""

import gzip
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

Answers = dict[int, str]
"""Labels by position."""


def last(symbols: Sequence[str], answer: str) -> Answers:
    return {len(symbols) - 1: answer}


def prefixes(answer: Callable[[Sequence[str]], str | None], dense: bool):
    """A task that `answer` solves for every prefix, or None where there is no answer."""

    def solve(symbols: Sequence[str]) -> Answers:
        if not dense:
            return last(symbols, answer(symbols))
        found = {n: answer(symbols[: n + 1]) for n in range(len(symbols))}
        return {place: each for place, each in found.items() if each is not None}

    return solve


def parity(symbols):
    return "ab"[sum(symbol == "b" for symbol in symbols) % 2]


def even_pairs(symbols):
    return "ab"[sum(a != b for a, b in pairwise(symbols)) % 2]


def cycle_nav(symbols):
    place = 0
    for move in symbols:
        place = (place + {"STAY": 0, "+1": 1, "-1": -1}[move]) % 5
    return f"P{place}"


def mod_arith(symbols):
    """Python's own arithmetic; the last operator has nothing behind it."""
    return None if symbols[-1].isdigit() else str(eval("".join(symbols[:-1])) % 5)


def mod_arith_brackets(symbols):
    assert symbols[-1] == "="
    return last(symbols, str(eval("".join(symbols[:-1])) % 5))


def solve_equation(symbols):
    """All digits are tried: exactly one solves it."""
    assert symbols[-1] == "ACT" and symbols[-3] == "=" and symbols.count("x") == 1
    left = "".join(symbols[:-3])
    found = [d for d in range(5) if eval(left.replace("x", str(d))) % 5 == int(symbols[-2])]
    (solution,) = found
    return last(symbols, str(solution))


def asked(answer: Callable[[list[str]], list[str]]):
    """A task with ACT: from there on the answer, with padding in its further places."""

    def solve(symbols: Sequence[str]) -> Answers:
        place = symbols.index("ACT")
        expected = answer(list(symbols[:place]))
        assert list(symbols[place + 1 :]) == ["_"] * (len(expected) - 1)
        return {place + n: each for n, each in enumerate(expected)}

    return solve


def bucket_sort(symbols):
    content = [symbol for symbol in symbols if symbol != "_"]
    assert len(symbols) == 2 * len(content) - 1
    return {len(content) - 1 + n: symbol for n, symbol in enumerate(sorted(content))}


def missing_duplicate(symbols):
    half = len(symbols) // 2
    place = symbols.index("MIS")
    first, again = list(symbols[:half]), list(symbols[half:])
    assert place >= half
    again[place - half] = first[place - half]
    assert first == again
    return last(symbols, first[place - half])


def ordered_set(content):
    return list(dict.fromkeys(content))


def stack(content):
    lies: list[str] = []
    for symbol in content:
        if symbol == "POP":
            del lies[-1:]
        else:
            lies.append(symbol.removeprefix("PUSH"))
    return lies[::-1]


def majority(symbols):
    counts = Counter(map(int, symbols))
    return last(symbols, str(min(n for n in counts if counts[n] == max(counts.values()))))


def majority_count(symbols):
    return last(symbols, str(min(62, max(Counter(symbols).values()))))


def mqar(pairs: int):
    def solve(symbols: Sequence[str]) -> Answers:
        values = dict(zip(symbols[0 : 2 * pairs : 2], symbols[1 : 2 * pairs : 2], strict=True))
        assert len(values) == pairs == len(set(values.values()))
        queries = {n: key for n, key in enumerate(symbols) if n >= 2 * pairs and key != "_"}
        assert sorted(queries.values()) == sorted(values)
        assert all(place % 2 == 0 for place in queries)
        return {place: values[key] for place, key in queries.items()}

    return solve


def nearest(angles: int):
    def solve(symbols: Sequence[str]) -> Answers:
        vectors = [(int(a[1:]), v) for a, v in (symbol.split(":") for symbol in symbols)]
        key = vectors[0][0]
        distances = [min((a - key) % angles, (key - a) % angles) for a, _ in vectors]
        return {
            n: vectors[1 + min(range(n), key=lambda m: distances[1 + m])][1]
            for n in range(1, len(vectors))
        }

    return solve


def list_ops(symbols):
    """A parser of nested lists."""
    rest = list(symbols)

    def read():
        symbol = rest.pop(0)
        if symbol.isdigit():
            return int(symbol)
        values = []
        while rest[0] != "]":
            values.append(read())
        rest.pop(0)
        assert len(values) >= 2
        return {
            "[MIN": min,
            "[MAX": max,
            "[MED": lambda v: int(statistics.median(v)),
            "[SM": lambda v: sum(v) % 10,
        }[symbol](values)

    value = read()
    assert not rest
    return last(symbols, str(value))


@cache
def made_digits() -> dict[tuple[int, ...], int]:
    """40 images that differ, each with its digit."""
    rng = random.Random(0)
    images = (tuple(rng.randint(0, 16) for _ in range(64)) for _ in range(40))
    return {image: n % 10 for n, image in enumerate(images)}


def digits_file(folder: Path) -> Path:
    """`made_digits` as scikit-learn's file of digits is written."""
    path = folder / "digits.csv.gz"
    lines = (",".join(map(str, (*image, digit))) for image, digit in made_digits().items())
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def digit(symbols):
    return last(symbols, str(made_digits()[tuple(int(symbol[1:]) for symbol in symbols)]))


SOLVED = {
    "parity": prefixes(parity, False),
    "even-pairs": prefixes(even_pairs, False),
    "cycle-nav": prefixes(cycle_nav, False),
    "mod-arith": prefixes(mod_arith, False),
    "mod-arith-brackets": mod_arith_brackets,
    "solve-equation": solve_equation,
    "reverse": asked(lambda content: content[::-1]),
    "stack": asked(stack),
    "bucket-sort": bucket_sort,
    "missing-duplicate": missing_duplicate,
    "odds-first": asked(lambda content: content[::2] + content[1::2]),
    "repetition": asked(lambda content: content),
    "set": asked(ordered_set),
    "majority": majority,
    "majority-count": majority_count,
    "mqar": mqar(4),
    "nearest": nearest(64),
    "listops": list_ops,
    "digits": digit,
}
"""By task, the labels of a sample's symbols."""

SOLVED_DENSE = {
    "parity": prefixes(parity, True),
    "even-pairs": prefixes(even_pairs, True),
    "cycle-nav": prefixes(cycle_nav, True),
    "mod-arith": prefixes(mod_arith, True),
}
