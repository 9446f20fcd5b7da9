"""How much malformed input is accepted, by build, tokenizer and collect alike, and what is said."""

import gzip
import json
import lzma
from pathlib import Path

import pytest

from data_prep.tools.train_tokenizer import _lines
from tests.data_prep.small_corpus import documents_of, run, write_jsonl
from xlstm_io.shards.manifest import load_manifest
from xlstm_io.tokenizer import open_tokenizer

GOOD = "".join(f'{{"text": "good document number {n} of many words"}}\n' for n in range(200))


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/good.jsonl").write_text(GOOD)
    return tmp_path / "in"


@pytest.fixture(params=["build", "tokenizer", "collect"])
def command(request, tmp_path, folder, tokenizer_dir, capsys):
    """Runs one of the commands that read a corpus; gives its exit code and what it printed."""
    flags = {
        "build": ["--tokenizer", tokenizer_dir, "--valid-fraction", 0, "--workers", 1],
        "tokenizer": ["--vocab-size", 290],
        "collect": ["--min-mb", 0],
    }[request.param]

    def call(*more):
        capsys.readouterr()
        arguments = [*flags, "--input", folder, "--out", tmp_path / "out", *more]
        code = run(request.param, *arguments)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out + captured.err

    return call


MOSTLY_MALFORMED = {
    "Latin-1 book": ("book.txt", "caf\xe9 au lait\n".encode("latin-1") * 1000, "iconv -f LATIN1"),
    "JSON array": ("a.json", b'[\n{"text": "a"},\n{"text": "b"}\n]', "jq -c '.[]'"),
    "JSON array in a line": ("a.jsonl", b'[{"text": "a"}, {"text": "b"}]', "jq -c '.[]'"),
    "pretty JSON": ("a.json", b'{\n "text": "a"\n}\n', "jq -c ."),
    "lines with commas": ("a.jsonl", b'{"text": "a"},\n{"text": "b"},\n', "end in commas"),
    "comma-separated values": ("a.jsonl", b"text,id\none,1\ntwo,2\n", "separated by commas"),
    "plain text": ("a.jsonl", b"once upon a time\n", "name it .txt"),
    "another field": ("a.jsonl", b'{"body": "a"}\n', "it has: body"),
}


@pytest.mark.parametrize("name", MOSTLY_MALFORMED)
def test_a_file_that_is_mostly_malformed_is_refused_by_name(name, folder, command):
    """Among 200 good records its few would pass any share."""
    file, data, remedy = MOSTLY_MALFORMED[name]
    (folder / file).write_bytes(data)
    code, said = command()
    assert code == 2 and said.count("\n") == 1, said
    assert f"{file}: " in said and "malformed" in said and remedy in said
    code, said = command("--max-bad-share", 1)
    assert code == 0 and "malformed, skipped" in said


def test_malformed_bytes_count_as_records_do(folder, command):
    """One record of 201, but most of the text."""
    with open(folder / "good.jsonl", "a") as file:
        file.write('{"text": "' + "long " * 5000 + "\n")
    code, said = command()
    assert code == 2 and "bytes are malformed, more than --max-bad-share 0.1" in said
    assert command("--max-bad-share", 0.9)[0] == 0


def test_most_records_malformed(folder, command):
    (folder / "good.jsonl").write_text(GOOD[: len(GOOD) // 10] + "\nno\n" + "x\n" * 300)
    code, said = command()
    assert code == 2 and "records are malformed" in said and "good.jsonl:" in said


def test_a_few_malformed_records_are_skipped_and_said(folder, command):
    with open(folder / "good.jsonl", "a") as file:
        file.write("no\n" * 9)
    code, said = command()
    assert code == 0 and said.count("malformed, skipped: ") == 6 and "skipped: 4 more" in said


def test_files_left_out_of_a_folder_are_counted_by_suffix(folder, command):
    for name in ("a.png", "b.PNG", "c.csv", "d", ".hidden", "SOURCE.json", "e.csv.gz"):
        (folder / name).write_bytes(b"{}")
    code, said = command()
    assert code == 0
    (line,) = (line for line in said.splitlines() if "left out" in line)
    for count in ("2 .png", "1 .csv", "1 without a suffix", "1 .csv.gz"):
        assert count in line.replace(";", ",").split(": ", 2)[2].split(", ")


def test_only_white_space_is_empty(tmp_path, tokenizer_dir, texts):
    corpus = write_jsonl(tmp_path / "c.jsonl", [*texts, "", " ", "\n\t\u3000", "\u2028"])
    with open(corpus, "a") as file:
        file.write('{"text": null}\n')
    flags = ["--input", corpus, "--tokenizer", tokenizer_dir, "--valid-fraction", 0.2]
    assert run("build", *flags, "--workers", 1, "--out", tmp_path / "out") == 0
    (source,) = load_manifest(tmp_path / "out").sources
    assert source.dropped == {"duplicate": 0, "empty": 5, "malformed": 0}
    assert run("collect", "--input", corpus, "--min-mb", 0, "--out", tmp_path / "c") == 0
    note = json.loads((tmp_path / "c/SOURCE.json").read_text())
    assert note["documents"] == len(texts)


def test_settings_and_notes_with_a_byte_order_mark(folder, tmp_path, tokenizer_dir):
    config = tmp_path / "prep.yaml"
    config.write_text(
        f"\ufeffinput: {folder}\ntokenizer: {tokenizer_dir}\nout: {tmp_path}/out\n"
        "valid_fraction: 0\nworkers: 1\n"
    )
    (folder / "SOURCE.json").write_text('\ufeff{"licence": "CC0"}')
    assert run("build", config) == 0
    assert load_manifest(tmp_path / "out").sources[0].provenance == {"licence": "CC0"}


def test_the_same_texts_in_every_wrapping_are_the_same_shards(tmp_path, tokenizer_dir):
    """Compressed, with a mark, or named as if it were not compressed: the same documents."""
    found = set()
    for name, data in {
        "a.jsonl": GOOD.encode(),
        "b.jsonl": GOOD.encode("utf-8-sig"),
        "c.jsonl.xz": lzma.compress(GOOD.encode()),
        "d.jsonl": gzip.compress(GOOD.encode("utf-8-sig")),
    }.items():
        (tmp_path / name).write_bytes(data)
        out = tmp_path / f"out-{name}"
        flags = ["--tokenizer", tokenizer_dir, "--valid-fraction", 0, "--workers", 1]
        assert run("build", "--input", tmp_path / name, *flags, "--out", out) == 0
        found.add(load_manifest(out).hash)
        assert len(documents_of(out, "train")) == 200
    assert len(found) == 1


def test_long_lines_train_the_tokenizer(tmp_path, capsys):
    """The trainer skips lines above 1 MiB; they are cut at spaces, and nothing of them is lost."""
    words = " ".join(f"word{n % 700}" for n in range(400_000))
    parts = list(_lines([words, "x" * (3 << 20), "short\tline"]))
    assert "".join(parts) == words + "x" * (3 << 20) + "shortline"
    assert max(len(part) for part in parts) <= 1 << 18
    assert all(part.startswith(" ") for part in parts[1:10])
    (tmp_path / "one.txt").write_text(words)
    flags = ["--input", tmp_path / "one.txt", "--vocab-size", 400, "--out", tmp_path / "t"]
    assert run("tokenizer", *flags) == 0
    tokenizer = open_tokenizer(tmp_path / "t")
    assert len(tokenizer.encode([" word123 word45"])[0]) < 8


def test_what_the_trainer_asserts_never_reaches_the_user(tmp_path, capfd):
    (tmp_path / "a.txt").write_text("hello world, hello again\n" * 50)
    flags = ["--input", tmp_path / "a.txt", "--vocab-size", 270, "--out", tmp_path / "t"]
    for tokens, rule in (
        (["<u>", "<u>"], "given twice"),
        ([""], "not empty"),
        (["<unk>"], "every tokenizer has"),
        (["\n"], "every tokenizer has"),
        (["<0x0A>"], "every tokenizer has"),
    ):
        assert run("tokenizer", *flags, "--special-tokens", *tokens) == 2
        error = capfd.readouterr().err
        assert rule in error and error.count("\n") == 1
    for size in (5000, 100):
        for kind in ("bpe", "unigram"):
            flags[3] = size
            assert run("tokenizer", *flags, "--model-type", kind) == 2
            error = capfd.readouterr().err
            assert error.count("\n") == 1 and ".cc" not in error and "INTERNAL" not in error
