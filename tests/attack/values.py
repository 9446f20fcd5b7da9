"""Hostile values with right hashes: what somebody writes who also writes the hashes.

Damage is found by its hash (`tests.attack.damage`). Here a file is well-formed and its hashes are
right, and one value in it is not what its reader expects.
"""

import hashlib
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.build.notes import write_note
from xlstm_io.shards.manifest import load_manifest
from xlstm_io.shards.rows import Block
from xlstm_io.shards.shard import ShardReader
from xlstm_io.shards.writer import ShardWriter

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**80, -(2**80), 1.5, -0.0),
    *(float(2**60), "", "0", "5", "..", "../../victim", "/etc/passwd", "a\0b", "\ud800", "\x1b[2J"),
    *("x" * 5000, [], {}, [[]], [None], {"a": 1}, [0] * 50, [[[[[[]]]]]]),
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of everything in a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def change_json(fields: Any, rng: random.Random) -> None:
    """Another value, no value, or one value too many at some place."""
    *way, last = rng.choice(places(fields))
    inner = fields
    for key in way:
        inner = inner[key]
    kind = rng.choice(["value", "value", "value", "value", "gone", "more", "twice"])
    if kind == "value":
        inner[last] = rng.choice(VALUES)
    elif kind == "gone":
        del inner[last]
    elif isinstance(inner, list):
        inner.insert(rng.randrange(len(inner) + 1), inner[last] if kind == "twice" else 7)
    else:
        inner["more" if kind == "more" else "../more"] = rng.choice(VALUES)


def change_manifest(folder: Path, rng: random.Random) -> None:
    """A value of the manifest, whose hash and checksum are made anew."""
    fields = json.loads((folder / "manifest.json").read_bytes())
    change_json(fields, rng)
    _store_manifest(folder, fields)


def _store_manifest(folder: Path, fields: dict) -> None:
    for name, without in (("hash", ("code", "hash", "checksum")), ("checksum", ("checksum",))):
        kept = {key: value for key, value in fields.items() if key not in without}
        fields[name] = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(fields))


def change_array(array: np.ndarray, rng: random.Random) -> np.ndarray:
    """A number, the order, the length or the type of an array."""
    kind = rng.choice(["number", "number", "number", "swap", "cut", "long", "type", "flat"])
    array = array.copy()
    if kind == "number":
        top = np.iinfo(array.dtype).max
        extreme = [0, 1, top, top // 2 + 1, top - 7, 2**31, 2**30, int(array.flat[0]) + 1]
        array.flat[rng.randrange(array.size)] = min(rng.choice(extreme), top)
    elif kind == "swap":
        array = array[::-1].copy()
    elif kind == "cut":
        array = array[:-1]
    elif kind == "long":
        array = np.concatenate([array, array[-1:]])
    elif kind == "type":
        array = array.astype(rng.choice(["<f8", "<i4", "<u2"]))
    else:
        array = array.reshape(1, -1)
    return array


def change_index(folder: Path, rng: random.Random) -> None:
    """An array of a shard's index, hashed in the manifest."""
    fields = json.loads((folder / "manifest.json").read_bytes())
    entry = rng.choice(fields["sources"][0]["splits"]["train"]["shards"])
    path = folder / entry["index"]
    with np.load(path) as stored:
        arrays = dict(stored)
    name = rng.choice(sorted(arrays))
    arrays[name] = change_array(arrays[name], rng)
    out = io.BytesIO()
    np.savez(out, **arrays)
    path.write_bytes(out.getvalue())
    entry["index_xxh3"] = xxhash.xxh3_64_hexdigest(out.getvalue())
    _store_manifest(folder, fields)


def change_rows(folder: Path, rng: random.Random) -> None:
    """A number in the tokens or the segments of a block, hashed in index and manifest."""
    manifest = load_manifest(folder)
    fields = json.loads((folder / "manifest.json").read_bytes())
    number = rng.randrange(len(manifest.shards("train")))
    entry = manifest.shards("train")[number]
    reader = ShardReader(manifest, entry)
    blocks = [reader.block(place) for place in range(reader.num_blocks)]
    reader.close()
    hit = rng.randrange(len(blocks))
    with ShardWriter(folder / entry.path) as writer:
        for place, block in enumerate(blocks):
            arrays = {n: array.copy() for n, array in vars(block).items() if array is not None}
            if place == hit:
                name = rng.choice(["tokens", "offsets", "segments"])
                shape = arrays[name].shape
                changed = change_array(arrays[name].reshape(-1), rng)
                fits = changed.dtype == arrays[name].dtype and changed.size == arrays[name].size
                if name != "tokens" or fits:
                    arrays[name] = changed.reshape(shape if fits else -1).astype(arrays[name].dtype)
            writer.write(Block(**arrays))
        written = writer.close()
    fields["sources"][0]["splits"]["train"]["shards"][number] |= vars(written)
    _store_manifest(folder, fields)


def change_note(pattern: str) -> Callable[[Path, random.Random], None]:
    """A value of a note of the build state, with the right checksum, in a build without its end."""

    def change(folder: Path, rng: random.Random) -> None:
        (folder / "manifest.json").unlink()
        path = rng.choice(sorted((folder / "_work").glob(pattern)))
        fields = json.loads(path.read_bytes())
        fields.pop("checksum", None)
        change_json(fields, rng)
        write_note(path, fields)

    return change
