"""Rules on other fields, samples of sources, and the settings of examples/ on made-up files."""

import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard

from data_prep.config import SourceConfig
from data_prep.sources.rules import FieldRule
from tests.data_prep.small_corpus import documents_of, run, tree_bytes
from xlstm_io.shards.manifest import load_manifest

EXAMPLES = Path(__file__).parents[2] / "examples"
LANGUAGES = ("en", "de", "no", None)


def rows(count: int = 80) -> list[dict]:
    """As datatrove's writers lay documents out."""
    return [
        {
            "text": f"document {n} of datatrove",
            "id": f"d{n}",
            "metadata": {"language": LANGUAGES[n % 4], "score": n / count, "licence": "CC0"},
        }
        for n in range(count)
    ]


def write_both(folder: Path) -> None:
    """The same documents in datatrove's two formats."""
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows())
    for name in ("jsonl", "parquet"):
        (folder / name).mkdir()
    (folder / "jsonl/00000.jsonl.gz").write_bytes(gzip.compress(lines))
    pq.write_table(pa.Table.from_pylist(rows()), folder / "parquet/00000.parquet")


def build(folder: Path, tokenizer_dir: Path, name: str, splits: float = 0, **source) -> Path:
    out = folder / f"out-{name}"
    config = {
        "sources": [{"name": "web", "input": str(folder / name), **source}],
        **{"tokenizer": str(tokenizer_dir), "out": str(out), "workers": 1},
        "valid_fraction": splits,
    }
    (folder / "prep.yaml").write_text(yaml.safe_dump(config))
    assert run("build", folder / "prep.yaml") == 0
    return out


def test_output_of_datatrove_is_filtered_by_its_fields(tmp_path, tokenizer_dir):
    write_both(tmp_path)
    keep = {"metadata.language": ["en", "no"], "metadata.score": {"min": 0.25, "max": 0.75}}
    expected = [
        row["text"]
        for row in rows()
        if row["metadata"]["language"] in ("en", "no") and 0.25 <= row["metadata"]["score"] <= 0.75
    ]
    outs = [build(tmp_path, tokenizer_dir, name, keep=keep) for name in ("jsonl", "parquet")]
    for out in outs:
        assert documents_of(out, "train") == expected
        (source,) = load_manifest(out).sources
        assert source.dropped["keep metadata.language"] == 40
        assert source.dropped["keep metadata.score"] == 40 - len(expected)
        assert source.filters["keep"]["metadata.score"] == {"min": 0.25, "max": 0.75}
    assert tree_bytes(outs[0]) == tree_bytes(outs[1])
    assert run("merge", outs[0]) == 0  # the rules are part of the stored settings


def test_rules():
    english = FieldRule("a", ("en", 1))
    assert english.keeps("en") and english.keeps(1) and not english.keeps(True)
    assert not english.keeps(None) and FieldRule("a", (None,)).keeps(None)
    some = FieldRule("a", min=0.5)
    assert some.keeps(0.5) and some.keeps(10**400)
    for value in ("0.9", True, float("nan"), None):
        assert not some.keeps(value)
    others = FieldRule("a", none_of=("x",))
    assert others.keeps("y") and not others.keeps("x")


def test_the_documented_source_is_valid():
    page = (EXAMPLES.parent / "docs/data.md").read_text()
    section = page.split("## Text from datatrove")[1].split("\n## ")[0]
    (block,) = re.findall(r"```yaml\n(.*?)```", section, re.S)
    (source,) = yaml.safe_load(block)
    rules = SourceConfig.model_validate(source).fields.keep
    assert [rule.field.split(".")[1] for rule in rules] == ["language", "language_score", "licence"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"min": "high"}, "keep.a"),
        ({"least": 3}, "least"),
        ({}, "give min, max or none_of"),
        (["en", False], "quote words such as 'no'"),
    ],
)
def test_bad_rules_are_one_message(rule, message, tmp_path, tokenizer_dir, capsys):
    config = {"sources": [{"name": "web", "input": str(tmp_path), "keep": {"a": rule}}]}
    config |= {"tokenizer": str(tokenizer_dir), "out": str(tmp_path / "out")}
    (tmp_path / "prep.yaml").write_text(yaml.safe_dump(config))
    assert run("build", tmp_path / "prep.yaml") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_fields_that_are_not_there(tmp_path, tokenizer_dir, capsys):
    write_both(tmp_path)
    with pytest.raises(AssertionError):
        build(tmp_path, tokenizer_dir, "parquet", keep={"lang": "en"})
    assert "no column 'lang' for `keep`" in capsys.readouterr().err
    with pytest.raises(AssertionError):
        build(tmp_path, tokenizer_dir, "jsonl", keep={"lang": "en"})
    assert "no document is left (" in capsys.readouterr().err
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("text")
    with pytest.raises(AssertionError):
        build(tmp_path, tokenizer_dir, "text", keep={"lang": "en"})
    assert "a text file has no fields" in capsys.readouterr().err


def test_samples_are_nested_and_counted(tmp_path, tokenizer_dir):
    write_both(tmp_path)
    found = {}
    for share in (0.2, 0.5, 1.0):
        (tmp_path / f"{share}").mkdir()
        (tmp_path / f"{share}/jsonl").symlink_to(tmp_path / "jsonl")
        out = build(tmp_path / f"{share}", tokenizer_dir, "jsonl", sample=share)
        found[share] = documents_of(out, "train")
        (source,) = load_manifest(out).sources
        assert source.dropped.get("sample", 0) == 80 - len(found[share])
        assert source.filters == ({} if share == 1 else {"sample": share})
    assert set(found[0.2]) < set(found[0.5]) < set(found[1.0])
    assert len(found[1.0]) == 80 and 5 < len(found[0.2]) < 30


def test_a_sample_is_split_like_the_whole(tmp_path, tokenizer_dir):
    """The halves of a hash that choose the two differ: by one, all of a sample would validate."""
    write_both(tmp_path)
    out = build(tmp_path, tokenizer_dir, "jsonl", sample=0.5, splits=0.5)
    counts = [len(documents_of(out, split)) for split in ("train", "valid")]
    assert min(counts) > 8 and sum(counts) < 56


def slimpajama(folder: Path) -> None:
    place = folder / "data/SlimPajama-627B/train/chunk1"
    place.mkdir(parents=True)
    names = ["CommonCrawl", "C4", "Github", "Book", "ArXiv", "Wikipedia", "StackExchange"]
    lines = [
        {"text": f"text {n}", "meta": {"redpajama_set_name": f"RedPajama{names[n % 7]}"}}
        for n in range(7000)
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (place / "example_train_0.jsonl.zst").write_bytes(zstandard.compress(data))


def dclm(folder: Path) -> None:
    place = folder / "data/dclm-baseline-1.0/global-shard_01_of_10/local-shard_0_of_10"
    place.mkdir(parents=True)
    score = "fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob"
    lines = [
        {
            "text": f"page {n}",
            "url": f"https://example.org/{n}",
            "language_id_whole_page_fasttext": {"en": 0.6 + 0.1 * (n % 2)},
            score: 0.05 * (n % 5),
        }
        for n in range(40_000)
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (place / "shard_00000000_processed.jsonl.zst").write_bytes(zstandard.compress(data))


@pytest.mark.parametrize("make", [slimpajama, dclm])
def test_sample_settings_build(make, tmp_path, tokenizer_dir, monkeypatch):
    make(tmp_path)
    (tmp_path / "data/tokenizer").symlink_to(tokenizer_dir)
    monkeypatch.chdir(tmp_path)
    assert run("build", EXAMPLES / f"prep_{make.__name__}.yaml", "--workers", 1) == 0
    manifest = load_manifest(f"data/{make.__name__}-shards")
    kept = {s.name: sum(split.docs for split in s.splits.values()) for s in manifest.sources}
    if make is slimpajama:
        assert kept == {"web": 2000, "books": 3000, "code": 2000}
    else:
        assert 1200 * 0.8 < kept["dclm"] < 1200 * 1.2  # of 12,000 that its rules keep
