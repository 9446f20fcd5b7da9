"""Damage as disks, networks and editors do it, drawn from a seed."""

import random
from collections.abc import Callable

_EXTREMES = (b"\x00", b"\xff", b"\x7f", b"\x80")


def damaged(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to four kinds of damage."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        rng.choice(_KINDS)(out, rng)
    return bytes(out)


def _range(out: bytearray, rng: random.Random, longest: int = 300) -> slice:
    begin = rng.randrange(len(out) + 1)
    return slice(begin, begin + rng.randint(1, longest))


def _flip_bits(out: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 1, 8, 64])):
        if out:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)


def _extreme_number(out: bytearray, rng: random.Random) -> None:
    """As a length or an offset would be."""
    size = rng.choice([1, 2, 4, 8])
    begin = rng.randrange(len(out) + 1)
    out[begin : begin + size] = rng.choice(_EXTREMES) * size


def _zeros(out: bytearray, rng: random.Random) -> None:
    place = _range(out, rng)
    out[place] = bytes(len(out[place]))


def _noise(out: bytearray, rng: random.Random) -> None:
    place = _range(out, rng)
    out[place] = rng.randbytes(len(out[place]))


def _cut_end(out: bytearray, rng: random.Random) -> None:
    del out[rng.randrange(len(out) + 1) :]


def _cut_out(out: bytearray, rng: random.Random) -> None:
    del out[_range(out, rng)]


def _insert(out: bytearray, rng: random.Random) -> None:
    begin = rng.randrange(len(out) + 1)
    out[begin:begin] = rng.randbytes(rng.randint(1, 20))


def _double(out: bytearray, rng: random.Random) -> None:
    place = _range(out, rng)
    out[place.start : place.start] = out[place]


def _move(out: bytearray, rng: random.Random) -> None:
    place = _range(out, rng)
    moved = out[place]
    del out[place]
    begin = rng.randrange(len(out) + 1)
    out[begin:begin] = moved


_KINDS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    *(_flip_bits, _extreme_number, _zeros, _noise, _cut_end),
    *(_cut_out, _insert, _double, _move),
)
