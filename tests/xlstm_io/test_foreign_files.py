"""JSON and arrays that somebody else wrote: a value of the expected shape, or one message."""

import io
import json
import os
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest

from xlstm_io.errors import PrepError, UserError
from xlstm_io.foreign.arrays import parse_npz
from xlstm_io.foreign.json_file import StrictModel, checked, parse_json, read_json
from xlstm_io.foreign.untrusted import LIMITS
from xlstm_io.foreign.yaml_file import MOST_VALUES
from xlstm_io.storage import open_file, open_plain, read_file


class Note(StrictModel):
    """A schema for these tests."""

    count: int
    share: float = 0.0
    names: list[str] = []  # noqa: RUF012


@pytest.mark.parametrize(
    ("text", "rule"),
    {
        "[" * 100_000: "nested too deeply",
        '{"a": NaN}': "NaN is not a number",
        '{"a": -Infinity}': "-Infinity is not a number",
        "[1, 2]": "not a JSON object",
        '{"a": ' + "9" * 5000 + "}": "digits",
        '{"a"': "Expecting",
        '{"\xff"': "valid JSON",
        "": "Expecting value",
    }.items(),
    ids=["deep", "NaN", "Infinity", "list", "digits", "cut", "Latin-1", "empty"],
)
def test_json_that_is_none_is_one_message_with_the_remedy(tmp_path, text, rule):
    file = tmp_path / "note.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(PrepError, match="restore it") as caught:
        read_json(file, 1 << 20, error=PrepError)
    assert rule in str(caught.value) and str(file) in str(caught.value)


def test_json_of_many_small_values_is_not_parsed():
    """225 MB of `[[],[],...]` would take ten times that."""
    assert len(parse_json(b"[" + b"[]," * 100 + b"[]]", most_values=202)) == 101
    with pytest.raises(ValueError, match="more than 201 values"):
        parse_json(b"[" + b"[]," * 100 + b"[]]", most_values=201)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"count": "5"}, r"count='5' must be a whole number"),
        ({"count": True}, r"count=True must be a whole number"),
        ({"count": 1.5}, r"count=1.5 must be a whole number"),
        ({"count": 1, "share": float("inf")}, r"share=inf must be a finite number"),
        ({"count": 1, "other": 2}, r"other is not one of the keys"),
        ({"count": [["x" * 10**6] * 100]}, r"count=\[\['xxx.* must be a whole number"),
        ({}, r"count is missing"),
        ([], r"must be"),
    ],
)
def test_values_of_another_shape_are_one_short_message(fields, words):
    with pytest.raises(PrepError, match=f"^a.json: {words}.*; restore the file$") as caught:
        checked(Note, fields, named_in="a.json", error=PrepError)
    assert len(str(caught.value)) < 400


def npz(header: str | None = None, **arrays: np.ndarray) -> bytes:
    """An archive as `np.savez` makes it; with `header` in place of that of `a`."""
    out = io.BytesIO()
    np.savez(out, **arrays)
    if header is None:
        return out.getvalue()
    raw = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.npy", raw + bytes(16))
    return out.getvalue()


def test_arrays_are_read_as_numpy_writes_them():
    made = {"a": np.arange(5, dtype=np.uint64), "b": np.arange(3, dtype=np.uint64)}
    read = parse_npz(npz(**made), {"a": "<u8", "b": "<u8"})
    assert all((read[name] == made[name]).all() for name in made)


HEADER = "{{'descr': '<u8', 'fortran_order': False, 'shape': ({},), }}"


@pytest.mark.parametrize(
    "raw",
    [
        npz(HEADER.format(2**53)),
        npz(HEADER.format(3)),
        npz(HEADER.format(-2)),
        npz(HEADER.format("2**80")),
        npz("{'descr': '|O', 'fortran_order': False, 'shape': (2,), }"),
        npz("{'descr': '<u8', 'fortran_order': False, 'shape': (2, 1), }"),
        npz("(" * 200),
        npz("[" * 60_000),
        npz(a=np.zeros(2, np.float64)),
        npz(b=np.zeros(2, np.uint64)),
        b"PK\x03\x04",
        b"",
    ],
    ids=lambda raw: f"{len(raw)} bytes",
)
def test_arrays_that_claim_what_is_not_there_are_one_error(raw):
    with pytest.raises(ValueError):
        parse_npz(raw, {"a": "<u8"})


def test_a_compressed_archive_is_not_unpacked():
    out = io.BytesIO()
    np.savez_compressed(out, a=np.zeros(1 << 20, np.uint64))
    with pytest.raises(ValueError, match="larger than the file"):
        parse_npz(out.getvalue(), {"a": "<u8"})


def test_pipes_sockets_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for place in (tmp_path / "pipe", tmp_path / "socket", tmp_path):
            for read in (open_plain, open_file, lambda path: read_file(path, 10, links=True)):
                with pytest.raises(OSError):
                    read(place)
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="not a plain file"):
        open_plain(tmp_path / "zero")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path / "pipe", 10)


def test_a_json_file_over_its_limit_is_not_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a": "x" * 100}))
    with pytest.raises(UserError, match="more than 50 are not read"):
        read_json(tmp_path / "a.json", 50)


def test_the_page_states_the_limits_as_they_are():
    page = (Path(__file__).parents[2] / "docs/security.md").read_text()
    stated = {
        "`manifest.json`, `metadata.json` of a checkpoint": LIMITS.checkpoint_json,
        "manifest of shards": LIMITS.shard_manifest,
        "index of a shard": LIMITS.shard_index,
        "block of a shard: tokens, or segments": LIMITS.shard_block,
        "tokenizer: each of its files": LIMITS.tokenizer,
        "`SOURCE.json`, `state.json` of a dataset": LIMITS.note,
        "build state: `build.json`, a plan": LIMITS.build_state,
    }
    for name, size in stated.items():
        assert f"| {name} | {size >> 20} MiB |" in page
    assert f"| values of one JSON file | {LIMITS.json_values:,} |" in page
    assert f"{LIMITS.yaml >> 20} MiB, {MOST_VALUES:,} values" in page
