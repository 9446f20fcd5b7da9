"""The pipeline over one folder of every odd shape: no good text is lost, no bad one is silent."""

import bz2
import gzip
import json
import lzma
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.data_prep.small_corpus import documents_of, run
from xlstm_io.shards.manifest import load_manifest
from xlstm_io.shards.shard import ShardReader
from xlstm_io.tokenizer import open_tokenizer

MARK = b"\xef\xbb\xbf"
ODD_FIELDS = (
    *(b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"[" * 1100 + b"]" * 1100),
    *(rb'"\ud83d"', b'"caf\xe9"', b'"a\tb"', rb'"\x41"', b"null"),
)
ODD_TEXTS = (
    *("  leading and trailing  ", "\ttabs\tand\r\nline ends\n\n", "na\u00efve \u65e5\u672c\u8a9e"),
    *("\u2581 a \u2581\u2581 space symbol", "a\0b", "\ufeffa mark is text here", "x" * 5000),
    *("<s> </s> <unk> spelled out", "e\u0301 \u200b \u2028 \u3000", "\U0001f468\u200d\U0001f469"),
)


class Corpus:
    """Writes files and keeps the texts that must be found in the shards."""

    def __init__(self, folder: Path):
        self.folder, self.texts = folder, list[str]()
        self.empty = self.duplicates = 0
        self.malformed: Counter[str] = Counter()  # by what the log must say
        folder.mkdir()

    def good(self, count: int) -> list[str]:
        """New texts, which are expected in the shards."""
        first = len(self.texts)
        made = [
            f"text {n} of the corpus, with some words in it" for n in range(first, first + count)
        ]
        self.texts += made
        return made

    def lines(self, count: int = 4) -> bytes:
        return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in self.good(count))

    def write(self, name: str, data: bytes) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(data)


def column_with_a_bad_row(texts: list[str]) -> pa.Array:
    values = [*(text.encode() for text in texts), b"caf\xe9"]
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values).buffers())


@pytest.fixture(scope="module")
def torture(tmp_path_factory) -> Corpus:
    made = Corpus(tmp_path_factory.mktemp("torture") / "in")
    made.write("plain.jsonl", made.lines())
    made.write("mark.jsonl", MARK + made.lines())
    made.write("one/record.jsonl", MARK + made.lines(1))
    made.write("joined.jsonl", MARK + made.lines() + MARK + made.lines())
    made.write("no-line-end.jsonl", made.lines().rstrip())
    made.write("line-ends.jsonl", made.lines().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    pack = {"gz": gzip.compress, "zst": zstandard.compress, "xz": lzma.compress}
    for suffix, function in {**pack, "bz2": bz2.compress}.items():
        made.write(f"a.jsonl.{suffix}", function(MARK + made.lines()) + function(made.lines()))
        made.write(f"named-like-{suffix}.jsonl", function(made.lines()))
    window = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    writer = zstandard.ZstdCompressor(compression_params=window).compressobj()
    made.write("long.jsonl.zst", writer.compress(made.lines()) + writer.flush())

    odd = [
        b'{"m": %s, "text": %s}\n' % (value, json.dumps(text).encode())
        for value, text in zip(ODD_FIELDS, made.good(len(ODD_FIELDS)), strict=True)
    ]
    odd += [
        b'{"id": %s, "text": %s}\n' % (value, json.dumps(text).encode())
        for value, text in zip(ODD_FIELDS, made.good(len(ODD_FIELDS)), strict=True)
    ]
    made.write("odd.jsonl", b"".join(odd))
    made.texts += ODD_TEXTS
    escaped = [json.dumps({"text": text}).encode() for text in ODD_TEXTS[::2]]
    raw = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in ODD_TEXTS[1::2]]
    made.write("odd-texts.jsonl", b"\n".join([*escaped, *raw]))

    empty = ["", " ", "\n\t", "\u3000"]
    repeated = made.texts[:3]
    lines = [json.dumps({"text": text}).encode() for text in [*empty, *repeated]]
    made.write("empty.jsonl", b"\n".join([*lines, b'{"text": null}']) + b"\n" + made.lines())
    made.empty, made.duplicates = len(empty) + 1, len(repeated)
    made.write("zero-bytes.txt", b"")
    made.empty += 1

    bad = {
        b"{broken": "not JSON",
        b'["list"]': "a JSON list, not an object",
        b'{"body": 1}': "no text in field 'text'",
        b'{"text": 3}': "no text in field 'text'",
        rb'{"text": "\ud83d"}': "half of a surrogate pair, or bytes that are not UTF-8",
        b'{"text": "caf\xe9"}': "half of a surrogate pair, or bytes that are not UTF-8",
    }
    made.write("bad.jsonl", made.lines(20) + b"\n".join(bad) + b"\n" + made.lines(20))
    made.malformed.update(bad.values())

    made.write("plain.txt", made.good(1)[0].encode())
    made.write("mark.txt", MARK + made.good(1)[0].encode())
    made.write("packed.txt.xz", lzma.compress(MARK + made.good(1)[0].encode()))
    texts = made.good(6)
    pq.write_table(
        pa.table({"text": [*texts, None], "id": column_with_a_bad_row(texts)}),
        made.folder / "bad-id.parquet",
    )
    made.empty += 1
    for name, kind in (("bytes", pa.binary()), ("views", pa.string_view())):
        pq.write_table(
            pa.table({"text": pa.array(made.good(3), kind)}), made.folder / f"{name}.parquet"
        )
    for name, new in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        table = pa.table({"text": column_with_a_bad_row(made.good(6))})
        with new(made.folder / f"{name}.arrow", table.schema) as file:
            file.write_table(table)
        made.malformed["not UTF-8 (byte"] += 1
    made.write("SOURCE.json", MARK + b'{"licence": "CC0"}')
    made.write("picture.png", b"\x89PNG")
    made.write(".hidden.jsonl", b'{"text": "hidden"}')
    return made


@pytest.fixture(scope="module")
def torture_shards(torture, tokenizer_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    flags = ["--input", torture.folder, "--tokenizer", tokenizer_dir, "--seq-len", 64]
    assert run("build", *flags, "--valid-fraction", 0.1, "--workers", 1, "--out", out) == 0
    return out


def test_every_good_text_is_in_the_shards_once(torture, torture_shards):
    found = documents_of(torture_shards, "train") + documents_of(torture_shards, "valid")
    assert sorted(found) == sorted(torture.texts)
    assert run("verify", torture_shards, "--full") == 0


def test_every_bad_record_is_counted_under_its_reason(torture, torture_shards):
    (source,) = load_manifest(torture_shards).sources
    assert source.dropped == {
        "duplicate": torture.duplicates,
        "empty": torture.empty,
        "malformed": torture.malformed.total(),
    }
    log = (torture_shards / "_work/malformed.log").read_text().splitlines()
    for reason, count in torture.malformed.items():
        assert sum(reason in line for line in log) == count, reason
    assert len(log) == torture.malformed.total()
    assert source.provenance == {"licence": "CC0"}


def test_ids_are_equal_in_shards_prompts_and_exports(torture, torture_shards):
    """The export's fast form reads U+2581 as a space, and says so; the texts without it agree."""
    from xlstm_mcore.convert.tokenizer.sentencepiece_fast import fast_tokenizer

    manifest = load_manifest(torture_shards)
    tokenizer = open_tokenizer(manifest.tokenizer_path)  # as `generate` opens it
    stored = []
    for split in ("train", "valid"):
        for entry in manifest.shards(split):
            reader = ShardReader(manifest, entry)
            for number in range(reader.num_blocks):
                stored += reader.block(number).tokens[:, :-1].ravel().tolist()
    in_shards = _between(stored, manifest.bos_id, manifest.eos_id)
    encoded = tokenizer.encode(torture.texts)
    prompts = {text: ids.tolist() for text, ids in zip(torture.texts, encoded, strict=True)}
    assert sorted(in_shards) == sorted(prompts.values())
    exported = fast_tokenizer(tokenizer)
    for text, ids in prompts.items():
        if "\u2581" not in text:
            assert exported.encode(text, add_special_tokens=False) == ids


def _between(stream: list[int], bos: int, eos: int) -> list[list[int]]:
    """The ids of each document of a stream, without bos and eos."""
    found: list[list[int]] = []
    inside = False
    for token in stream:
        if token == bos:
            found.append([])
            inside = True
        elif token == eos:
            inside = False
        elif inside:
            found[-1].append(token)
    return found
