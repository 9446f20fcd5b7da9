"""Readers on input of odd shapes: every good text is read, and what is not read decides nothing."""

import bz2
import codecs
import gzip
import json
import lzma
import random
import struct
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.sources.documents import LARGEST_TEXT, Document, Fields, Malformed
from data_prep.sources.files import expand_inputs
from data_prep.sources.formats import apart, tables
from data_prep.sources.formats.json_lines import parse_leniently
from data_prep.sources.readers import read_documents
from xlstm_io.errors import PrepError

BOM = codecs.BOM_UTF8
LINES = b"".join(b'{"text": "document %d"}\n' % n for n in range(50))
TEXTS = [f"document {n}" for n in range(50)]


def zstd_with_window(log: int) -> bytes:
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=log)
    writer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return writer.compress(LINES) + writer.flush()


SKIPPED = struct.pack("<II", 0x184D2A53, 5) + b"hello"
COMPRESSED = {
    "gz": gzip.compress,
    "zst": zstandard.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
}


def read(path, data: bytes | None = None, **fields) -> list:
    if data is not None:
        path.write_bytes(data)
    return list(read_documents(str(path), Fields(**fields)))


def texts(items) -> list[str]:
    return [item.text for item in items]


@pytest.mark.parametrize("suffix", ["", *COMPRESSED])
def test_a_byte_order_mark_is_not_text(tmp_path, suffix):
    pack = COMPRESSED.get(suffix, bytes)
    name = f".{suffix}" if suffix else ""
    path = tmp_path / f"a.jsonl{name}"
    assert texts(read(path, pack(BOM + LINES))) == TEXTS
    assert texts(read(tmp_path / f"a.txt{name}", pack(BOM + b"one\ntwo"))) == ["one\ntwo"]
    for split in ("lines", "paragraphs"):
        found = read(tmp_path / f"a.txt{name}", pack(BOM + b"one\n\ntwo"), split=split)
        assert texts(found) == ["one", "two"]
    (last,) = read_documents(str(path), wanted=np.array([49]))
    assert last.text == TEXTS[49]


def test_files_with_marks_that_were_joined(tmp_path):
    items = read(tmp_path / "a.jsonl", BOM + LINES + BOM + LINES)
    assert texts(items) == TEXTS * 2
    (found,) = read_documents(
        str(tmp_path / "a.jsonl"), wanted=np.array([50]), offset=items[50].offset
    )
    assert found == items[50]


ODD_VALUES = {
    "NaN": b"NaN",
    "infinity": b"-Infinity",
    "beyond every float": b"1e999",
    "400 digits": b"9" * 400,
    "5,000 digits": b"9" * 5000,
    "1,100 levels": b"[" * 1100 + b"]" * 1100,
    "100,000 levels": b'{"a":[' * 100_000 + b"]}" * 100_000,
    "half of a surrogate pair": rb'"\ud83d"',
    "Latin-1": b'"caf\xe9"',
    "a tab": b'"a\tb"',
    "an unknown escape": rb'"\x41"',
    "a mark": b'"' + BOM + b'"',
}


@pytest.mark.parametrize("name", ODD_VALUES)
def test_what_is_not_read_does_not_decide(name, tmp_path):
    lines = b'{"text": "one", "m": %s}\n{"id": %s, "text": "two"}\n' % ((ODD_VALUES[name],) * 2)
    items = read(tmp_path / "a.jsonl", lines)
    assert texts(items) == ["one", "two"]
    items[1].id.encode()  # it goes into files


def test_a_text_that_is_not_text_is_malformed(tmp_path):
    odd = [rb'"\ud83d"', b'"caf\xe9"', rb'"\x41"', b'"a\tb"', b"NaN", b"3", b"[1]"]
    items = read(tmp_path / "a.jsonl", b"".join(b'{"text": %s}\n' % value for value in odd))
    assert len(items) == len(odd) and all(isinstance(item, Malformed) for item in items)
    assert "surrogate" in items[0].reason and "UTF-8" in items[1].reason
    assert read(tmp_path / "b.jsonl", b'{"text": null}\n') == [Document(0, "b.jsonl:1", "")]


def random_json(rng: random.Random, depth: int = 0):
    kind = rng.randrange(9 if depth < 5 else 6)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind < 3:
        return rng.choice([0, -1, 1.5, 1e300, -2.5e-7, 10**30])
    if kind < 6:
        return rng.choice(["", "a", 'quo"te\\', "né\n", "\U0001f600", "{}", "[1,2]", "\x7f"])
    if kind < 8:
        return {f"k{n}": random_json(rng, depth + 1) for n in range(rng.randrange(4))}
    return [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]


@pytest.mark.parametrize(
    "line", [b"[" * 4000, b'{"a":' * 2000, b'{"text":"x","n":[NaN' + b",{}" * 1000]
)
def test_the_lenient_parser_stops_at_a_line_of_too_many_values(line, monkeypatch):
    """64 MiB of brackets took it minutes and gigabytes."""
    monkeypatch.setattr("data_prep.sources.formats.json_lines._MOST_WORDS", 1000)
    with pytest.raises(ValueError, match="more than 1,000 values"):
        parse_leniently(line)


def test_the_lenient_parser_agrees_with_json():
    """On sound texts it gives what `json` gives; cut or altered ones it refuses as `json` does."""
    rng, refused = random.Random(5), 0
    for _ in range(400):
        value = random_json(rng)
        indent = rng.choice([None, 1])
        data = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=indent).encode()
        assert parse_leniently(data) == value
        broken = bytearray(data)
        for _ in range(rng.randrange(1, 3)):
            broken[rng.randrange(len(broken))] = rng.choice(b'{}[]:,"1a ')
        broken = bytes(broken[: rng.randrange(1, len(broken) + 1)])
        try:
            json.loads(broken)
        except ValueError as error:
            # The contents of strings and numbers such as 01 are what it is lenient about.
            if "escape" in str(error) or "control" in str(error):
                continue
            refused += 1
            with pytest.raises(ValueError, match=r"."):
                if not isinstance(parse_leniently(broken), dict | list):
                    raise ValueError("a lone word") from None
                assert any(digit in broken for digit in b"01"), broken
                raise ValueError("a number such as 01") from None
        else:
            parse_leniently(broken)
    assert refused > 100


def test_nested_fields(tmp_path):
    lines = (
        b'{"content": {"text": "in"}, "m": {"id": 7}}\n{"content.text": "out"}\n{"content": 1}\n'
    )
    items = read(tmp_path / "a.jsonl", lines, text="content.text", id="m.id")
    assert items[0] == Document(0, "7", "in") and items[1].text == "out"
    assert isinstance(items[2], Malformed) and "content.text" in items[2].reason
    rows = [{"text": "in", "more": 1}, None, {"text": None, "more": 2}]
    table = pa.table({"content": rows, "m": [{"id": "x"}] * 3})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        items = read(tmp_path / name, text="content.text", id="m.id")
        assert [(item.id, item.text) for item in items] == [("x", "in"), ("x", ""), ("x", "")]
        with pytest.raises(PrepError, match=r"no column 'content.body'"):
            read(tmp_path / name, text="content.body")


def invalid_utf8() -> pa.Array:
    """A column of strings, the 31st of which is not UTF-8."""
    values = [b"good %d " % n * 20 for n in range(30)] + [b"caf\xe9 " * 20]
    return pa.Array.from_buffers(pa.string(), 31, pa.array(values, pa.binary()).buffers())


def save_table(folder, table: pa.Table) -> list:
    pq.write_table(table, folder / "a.parquet")
    with pa.ipc.new_stream(folder / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_file(folder / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    return [folder / name for name in ("a.parquet", "stream.arrow", "file.arrow")]


def test_a_row_that_is_not_utf8_is_one_malformed_record(tmp_path):
    encoded = pa.DictionaryArray.from_arrays(pa.array(range(31)), invalid_utf8())
    for column in (invalid_utf8(), encoded):
        paths = save_table(tmp_path, pa.table({"text": column}))
        for path in paths[column is encoded :]:  # Arrow itself refuses such a parquet file
            *good, bad = read(path)
            assert len(good) == 30 and isinstance(bad, Malformed)
            assert bad.where == f"{path}:31" and "not UTF-8" in bad.reason
    table = pa.table({"text": [f"fine {n}" for n in range(31)], "id": invalid_utf8()})
    for path in save_table(tmp_path, table):
        items = read(path)
        assert texts(items) == table["text"].to_pylist() and items[30].id.startswith("caf\ufffd")


def test_columns_of_bytes_dictionaries_and_views(tmp_path):
    values = ["a", "ü", None, "b"]
    kinds = [
        *(pa.binary(), pa.large_binary(), pa.large_string(), pa.binary_view(), pa.string_view()),
        pa.dictionary(pa.int8(), pa.string()),
    ]
    for kind in kinds:
        encoded = pa.array(values).cast(kind) if pa.types.is_dictionary(kind) else None
        column = pa.array(values, kind) if encoded is None else encoded
        for path in save_table(tmp_path, pa.table({"text": column})):
            assert texts(read(path)) == ["a", "ü", "", "b"]
    (path, *_) = save_table(tmp_path, pa.table({"text": [1, 2]}))
    assert [item.reason for item in read(path)] == ["int in column 'text'"] * 2


def test_a_parser_that_dies_is_an_error_of_its_file(tmp_path, monkeypatch):
    def dying():
        yield from range(300)
        import ctypes

        ctypes.string_at(0)

    with pytest.raises(PrepError, match=r"a\.parquet: it is damaged.*SIGSEGV"):
        list(apart.yield_apart(dying, "a.parquet", int))
    items = apart.yield_apart(lambda: iter(range(10**9)), "a.parquet", int)
    assert next(items) == 0
    items.close()  # ends the process

    def buggy():
        yield 1 / 0

    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        list(apart.yield_apart(buggy, "a.parquet", int))


def test_tables_of_large_texts_are_held_a_few_at_a_time():
    """256 books of 16 MiB took 4 GiB, in both processes; so did one that stands in every row."""
    sizes = [1] * 3 + [apart._BATCH_BYTES] * 2 + [1] * (apart._BATCH + 1)
    assert [len(batch) for batch in apart._batches(iter(sizes), int)] == [4, 1, apart._BATCH, 1]
    column = pa.array(["a long text", None, "b"]).dictionary_encode().take(pa.array([0, 0, 1, 2]))
    first, second, *others = tables._values(column)
    assert first is second and first == b"a long text" and others == [None, b"b"]
    many = pa.array(["x" * 1000 + str(n) for n in range(20_000)]).dictionary_encode()
    tracemalloc.start()  # each batch of a table has the dictionary of its whole row group
    assert len(tables._values(many[:10])) == 10
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert tables._wanted_of(np.arange(0, 1000, 2), 11, 4) == {12, 14}  # of a row group alone


def test_damaged_tables_are_errors(tmp_path):
    texts = [f"a longer text with the number {n}" for n in range(3000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=100)
    data = (tmp_path / "a.parquet").read_bytes()
    damaged = {
        "zeros": data[:300] + bytes(200) + data[500:],
        "cut": data[:-100],
        "empty": b"PAR1PAR1",
    }
    for name, content in damaged.items():
        with pytest.raises(PrepError, match=f"{name}.parquet"):
            read(tmp_path / f"{name}.parquet", content)


@pytest.mark.parametrize("log", [28, 31])
def test_zstd_windows_of_any_size(tmp_path, log):
    assert texts(read(tmp_path / "a.jsonl.zst", zstd_with_window(log))) == TEXTS


def test_frames_of_every_kind(tmp_path):
    for suffix, pack in COMPRESSED.items():
        path = tmp_path / f"a.jsonl.{suffix}"
        assert texts(read(path, pack(LINES[:100]) + pack(b"") + pack(LINES[100:]))) == TEXTS
        with pytest.raises(PrepError, match=r"a\.jsonl"):  # the second frame is damaged
            read(path, pack(LINES[:100]) + b"\x01" + pack(LINES[100:]))
        with pytest.raises(PrepError, match="truncated"):
            read(path, pack(LINES)[:-3])
    zst = zstandard.compress(LINES)
    assert texts(read(tmp_path / "a.jsonl.zst", SKIPPED + zst + SKIPPED)) == TEXTS
    assert texts(read(tmp_path / "a.jsonl.gz", gzip.compress(LINES) + bytes(512))) == TEXTS


def test_compression_is_seen_in_the_file_not_in_its_name(tmp_path):
    for suffix, pack in COMPRESSED.items():
        assert texts(read(tmp_path / f"{suffix}.jsonl", pack(LINES))) == TEXTS
        with pytest.raises(PrepError, match=f"named .{suffix} and not compressed like that"):
            read(tmp_path / f"b.jsonl.{suffix}", LINES)
    with pytest.raises(PrepError, match=r"named \.gz but xz"):
        read(tmp_path / "c.jsonl.gz", lzma.compress(LINES))


def tar() -> bytes:
    import io
    import tarfile

    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return whole.getvalue()


NOT_TEXT = {
    "UTF-16 with mark": ("text".encode("utf-16"), "iconv -f UTF-16"),
    "UTF-16LE": ("some text".encode("utf-16-le"), "iconv -f UTF-16LE"),
    "UTF-16BE": ("some text".encode("utf-16-be"), "iconv -f UTF-16BE"),
    "zip": (b"PK\3\4" + bytes(40), "zip archive"),
    "tar": (tar(), "tar archive"),
    "parquet": (b"PAR1" + bytes(40), "name it .parquet"),
    "PDF": (b"%PDF-1.7\n", "PDF"),
}


@pytest.mark.parametrize("name", NOT_TEXT)
@pytest.mark.parametrize("suffix", ["jsonl", "txt", "jsonl.gz"])
def test_what_is_not_text_is_refused_by_its_kind(name, suffix, tmp_path):
    data, message = NOT_TEXT[name]
    with pytest.raises(PrepError, match=message) as caught:
        read(tmp_path / f"a.{suffix}", gzip.compress(data) if suffix.endswith("gz") else data)
    assert f"a.{suffix}" in str(caught.value)


def test_tables_of_text_are_refused_with_a_remedy_that_works(tmp_path, monkeypatch):
    import shlex
    import subprocess
    import sys

    for name, text in (("a.csv", 'text,n\n"one, two",1\n'), ("b.tsv", "text\tn\none, two\t1\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(PrepError, match="is not read") as caught:
            expand_inputs([str(tmp_path / name)])
        remedy = str(caught.value).split("`")[1]
        words = shlex.split(remedy)
        subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, check=True, timeout=60)
        assert texts(read(tmp_path / "corpus.parquet")) == ["one, two"]


def test_documents_of_any_size_are_refused_or_read_in_parts(tmp_path):
    half = "word " * (LARGEST_TEXT // 10)
    path = tmp_path / "a.txt"
    path.write_text(f"{half}\n{half}\nthe end of it")
    with pytest.raises(PrepError, match="the largest that is read has 16 MiB: set --text-split"):
        read(path)
    assert [len(text) for text in texts(read(path, split="lines"))] == [len(half), len(half), 13]
    (whole,) = read(path, split="paragraphs")
    assert isinstance(whole, Malformed) and "16 MiB" in whole.reason
    lines = tmp_path / "a.jsonl"
    with open(lines, "w") as file:
        file.write(json.dumps({"text": half + half + "x" * 20}) + '\n{"text": "good"}\n')
        file.write('{"m": "' + half * 9 + '", "text": "x"}\n{"text": "last"}\n')
    items = read(lines)
    assert [item.text for item in items if isinstance(item, Document)] == ["good", "last"]
    assert "the largest that is read" in items[0].reason and "a line of" in items[2].reason
    (last,) = read_documents(str(lines), wanted=np.array([3]), offset=items[3].offset)
    assert last == items[3]
