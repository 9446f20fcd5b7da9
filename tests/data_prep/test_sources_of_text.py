"""Remote files, Hugging Face datasets on disk, text in parts, adopted tokenizers."""

import gzip
import json
import os
import shutil
import zipfile

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import zstandard

from data_prep.sources import streams
from data_prep.sources.documents import Document, Fields, Malformed
from data_prep.sources.files import expand_inputs, file_fingerprint
from data_prep.sources.readers import read_documents
from tests.data_prep.small_corpus import (
    documents_of,
    run,
    save_hf_tokenizer,
    tree_bytes,
    write_jsonl,
)
from xlstm_io.errors import PrepError
from xlstm_io.shards.manifest import load_manifest
from xlstm_io.tokenizer import open_tokenizer


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/", recursive=True)


def texts_of(path, *args):
    return [item.text for item in read_documents(path, *args)]


def test_remote_build_equals_the_local_one(memory, tmp_path, corpus, build_flags, shards):
    memory.pipe("/bucket/corpus.jsonl", corpus.read_bytes())
    memory.pipe("/bucket/notes.png", b"?")
    out = tmp_path / "out"
    assert run("build", *build_flags, "--input", "memory://bucket", "--out", out) == 0
    assert tree_bytes(out) == tree_bytes(shards)
    memory.pipe("/bucket/SOURCE.json", b'{"licence": "CC0"}')
    again = tmp_path / "again"
    flags = ["--input", "memory://bucket/*.jsonl", "--out", again]
    assert run("build", *build_flags, *flags) == 0
    assert load_manifest(again).sources[0].provenance == {"licence": "CC0"}


def test_a_glob_asks_a_store_once_and_not_for_each_file(memory, monkeypatch):
    for number in range(9):
        memory.pipe(f"/bucket/{number}.jsonl", b'{"text": "x"}')
    memory.mkdir("/bucket/folder.jsonl")

    asked, isdir = [], type(memory).isdir
    monkeypatch.setattr(
        type(memory), "isdir", lambda fs, path: asked.append(path) or isdir(fs, path)
    )
    assert len(expand_inputs(["memory://bucket/*.jsonl"])) == 9
    assert not [path for path in asked if path.endswith(".jsonl")]


def test_archives_globs_and_what_changes(memory, tmp_path, corpus, texts):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(corpus, "in/one.jsonl")
        archive.write(corpus, "in/two.txt")
    url = f"zip://in/*.jsonl::{tmp_path}/a.zip"
    assert expand_inputs([url]) == [f"zip://in/one.jsonl::{tmp_path}/a.zip"]
    assert texts_of(expand_inputs([url])[0]) == texts
    memory.pipe("/b/1.txt", b"one")
    first = file_fingerprint("memory://b/1.txt")
    memory.pipe("/b/1.txt", b"two")
    assert file_fingerprint("memory://b/1.txt") != first
    assert expand_inputs([f"file://{corpus}"]) == [f"file://{corpus}"]
    for url, message in (
        ("memory://nowhere/*.txt", "no file matches"),
        ("memory://nowhere", "no file matches"),
        ("nonsense://a", "nonsense"),
    ):
        with pytest.raises(PrepError, match=message):
            expand_inputs([url])


def test_local_names_with_the_marks_of_urls(tmp_path, monkeypatch, texts):
    """Perl's manual has files such as Algorithm::Diff.3pm.gz."""
    plain = write_jsonl(tmp_path / "plain", texts).read_bytes()
    names = ["A::Diff.jsonl.gz", "b::c.jsonl.gz", "what?.jsonl.gz"]
    for name in names:
        (tmp_path / name).write_bytes(gzip.compress(plain))
    monkeypatch.chdir(tmp_path)
    for inputs in ([str(tmp_path)], names, ["*.gz"]):
        found = expand_inputs(inputs)
        assert [path.split("/")[-1] for path in found] == names
        for path in found:
            assert texts_of(path) == texts


def test_collecting_what_is_no_jsonl_prints_a_few_lines(tmp_path, texts, capsys):
    write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "package.json").write_text("{\n" * 100)
    flags = ["--input", tmp_path, "--min-mb", 0, "--out", tmp_path / "out"]
    assert run("collect", *flags) == 2
    assert "package.json: 100 of 100 records are malformed" in capsys.readouterr().err
    assert run("collect", *flags, "--max-bad-share", 1) == 0
    shown = capsys.readouterr().out
    assert shown.count("not JSON") == 5 and "skipped: 95 more" in shown and "100 skipped" in shown


def save_dataset(folder, texts, *, more=None):
    """The files that Hugging Face datasets' save_to_disk writes."""
    folder.mkdir(parents=True)
    names = []
    for number in range(2):
        names.append(f"data-0000{number}-of-00002.arrow")
        mine = texts[number * len(texts) // 2 : (number + 1) * len(texts) // 2]
        table = pa.table({"body": mine, "id": list(range(len(mine)))})
        with pa.ipc.new_stream(folder / names[-1], table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    state = {"_data_files": [{"filename": name} for name in names], **(more or {})}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    shutil.copy(folder / names[0], folder / "cache-123.arrow")


def test_hugging_face_dataset_on_disk(tmp_path, capsys):
    texts = [f"text {n}" for n in range(20)] + [None]
    save_dataset(tmp_path / "d/train", texts)
    files = expand_inputs([str(tmp_path / "d")])
    assert [file.split("/")[-1][:10] for file in files] == ["data-00000", "data-00001"]
    fields = Fields("body")
    items = [item for file in files for item in read_documents(file, fields)]
    assert [item.text for item in items] == [*texts[:-1], ""]
    wanted = list(read_documents(files[0], fields, np.array([1, 7])))
    assert [(item.record, item.text) for item in wanted] == [(1, "text 1"), (7, "text 7")]
    with pytest.raises(PrepError, match=r"no column 'text'.*body, id"):
        list(read_documents(files[0]))
    (tmp_path / "d/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(PrepError, match="splits train, test; name the folder of one"):
        expand_inputs([str(tmp_path / "d")])
    save_dataset(tmp_path / "chosen", texts, more={"_indices_files": [{"filename": "i.arrow"}]})
    with pytest.raises(PrepError, match="flatten_indices"):
        expand_inputs([str(tmp_path / "chosen")])
    (tmp_path / "bad.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(PrepError, match="not an arrow file"):
        list(read_documents(str(tmp_path / "bad.arrow")))


def test_arrow_files_of_the_random_access_kind(tmp_path):
    table = pa.table({"text": ["a", "b"]})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert texts_of(str(tmp_path / "a.arrow")) == ["a", "b"]


def test_text_in_lines_and_paragraphs(tmp_path):
    path = tmp_path / "big.txt"
    path.write_bytes("one\ntwo\r\n \nthrée\n\n\n\n  four\nfive".encode() + b"\n\nb\xffd\n\nsix")
    items = list(read_documents(str(path), Fields(split="lines")))
    assert [item.text for item in items if isinstance(item, Document)] == [
        *("one", "two", "thrée", "  four", "five", "six")
    ]
    items = list(read_documents(str(path), Fields(split="paragraphs")))
    assert items[1].text == "thrée" and items[2].text == "  four\nfive"
    assert isinstance(items[3], Malformed) and items[3].where == f"{path}:11"
    assert items[4].id == "big.txt:13"
    wanted = list(read_documents(str(path), Fields(split="paragraphs"), np.array([0, 2])))
    assert [item.text for item in wanted] == ["one\r\ntwo".replace("\r", ""), "  four\nfive"]


def test_one_large_text_file_is_built_from_paragraphs(tmp_path, tokenizer_dir, capsys):
    paragraphs = [f"paragraph {n}\nof two lines" for n in range(60)]
    (tmp_path / "big.txt").write_text("\n\n".join(paragraphs))
    flags = ["--input", tmp_path / "big.txt", "--tokenizer", tokenizer_dir, "--workers", 1]
    flags += ["--valid-fraction", 0.2, "--out", tmp_path / "out"]
    assert run("build", *flags) == 2
    assert "--text-split" in capsys.readouterr().err
    assert run("build", *flags, "--text-split", "paragraphs") == 0
    found = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "valid")
    assert sorted(found) == sorted(paragraphs)
    flags = ["--input", tmp_path / "big.txt", "--min-mb", 0, "--out", tmp_path / "c"]
    assert run("collect", *flags, "--text-split", "paragraphs") == 0
    assert texts_of(str(tmp_path / "c/corpus.jsonl.zst")) == paragraphs


def test_reading_begins_at_the_first_wanted_line(tmp_path, texts):
    path = str(write_jsonl(tmp_path / "a.jsonl", texts))
    items = list(read_documents(path))
    found = list(read_documents(path, wanted=np.array([50, 60]), offset=items[50].offset))
    assert found == [items[50], items[60]]
    cut = tmp_path / "cut.jsonl"  # proves that nothing before is read
    cut.write_bytes(
        b"\xff" * items[50].offset + (tmp_path / "a.jsonl").read_bytes()[items[50].offset :]
    )
    found = list(read_documents(str(cut), wanted=np.array([50]), offset=items[50].offset))
    assert [item.text for item in found] == [texts[50]]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.zst"])
def test_shards_of_a_compressed_file_read_it_once(
    name, tmp_path, tokenizer_dir, texts, monkeypatch
):
    """It cannot be entered in its middle, and reading up to there costs more than tokenizing."""
    lines = [json.dumps({"text": t}) if "json" in name else " ".join(t.split()) for t in texts]
    raw = "\n".join(lines).encode()
    path, plain = tmp_path / name, tmp_path / name.rpartition(".")[0]
    plain.write_bytes(raw)
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else zstandard.compress(raw))
    flags = ["--tokenizer", tokenizer_dir, "--seq-len", 16, "--shard-mb", 0.002, "--workers", 1]
    flags += ["--valid-fraction", 0.3, "--text-split", "lines"]
    opened = []

    def counted(path):
        opened.append(path)
        return streams.open_text(path)

    for module in ("json_lines", "text"):
        monkeypatch.setattr(f"data_prep.sources.formats.{module}.open_text", counted)
    assert run("build", "--input", path, *flags, "--out", tmp_path / "out") == 0
    assert opened == [str(path)] * 3  # the scan, the training shards, the validation shards
    manifest = load_manifest(tmp_path / "out")
    assert len(manifest.shards("train")) > 5 and len(manifest.shards("valid")) > 1
    assert run("build", "--input", plain, *flags, "--out", tmp_path / "plain") == 0
    assert tree_bytes(tmp_path / "plain") == tree_bytes(tmp_path / "out")


def test_reading_does_not_go_on_in_a_file_that_was_replaced(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    for word in ("old", "new"):
        lines = "".join(json.dumps({"text": f"{word} {n}"}) + "\n" for n in range(9))
        path.write_bytes(gzip.compress(lines.encode()))
        os.utime(path, (len(word), word == "new"))
        for wanted in ([0, 2], [1], [4]):
            found = texts_of(str(path), Fields(), np.array(wanted))
            assert found == [f"{word} {n}" for n in wanted]


def test_texts_may_lie_in_the_folder_of_their_shards(corpus, tmp_path, tokenizer_dir, capsys):
    (tmp_path / "raw").mkdir()
    shutil.copy(corpus, tmp_path / "raw")
    flags = ["--tokenizer", tokenizer_dir, "--workers", 1, "--valid-fraction", 0.2]
    assert run("build", "--input", tmp_path, *flags, "--out", tmp_path) == 0
    (tmp_path / "manifest.json").unlink()
    for _ in range(2):
        assert run("build", "--input", tmp_path, *flags, "--out", tmp_path) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_links_to_folders_are_said_to_be_left_out(tmp_path, texts, capsys):
    (tmp_path / "real").mkdir()
    write_jsonl(tmp_path / "real/a.jsonl", texts[:3])
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in/b.jsonl", texts[3:])
    (tmp_path / "in/other").symlink_to(tmp_path / "real")
    (tmp_path / "in/circle").symlink_to(tmp_path / "in")
    assert expand_inputs([str(tmp_path / "in")]) == [str(tmp_path / "in/b.jsonl")]
    assert "left out: 2 links to folders; name them by a glob" in capsys.readouterr().out
    named = expand_inputs([str(tmp_path / "in/other"), str(tmp_path / "in/*.jsonl")])
    assert named == [str(tmp_path / "in/b.jsonl"), str(tmp_path / "in/other/a.jsonl")]


def test_names_that_are_not_utf8(tmp_path, tokenizer_dir, texts, capsys):
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "broken\n")
    flags = ["--input", path, "--tokenizer", tokenizer_dir, "--workers", 1]
    assert run("build", *flags, "--valid-fraction", 0.2, "--out", tmp_path / "out") == 0
    assert r"caf\udce9.jsonl:121: " in (tmp_path / "out/_work/malformed.log").read_text()
    assert run("collect", "--input", path, "--min-mb", 0, "--out", tmp_path / "corpus") == 0
    (first, *_) = read_documents(str(tmp_path / "corpus/corpus.jsonl.zst"))
    assert first.id == r"caf\udce9.jsonl:1"


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory, texts):
    return save_hf_tokenizer(tmp_path_factory.mktemp("hf"), texts)


def test_hugging_face_tokenizer_is_adopted_and_builds(
    hf_folder, tmp_path, build_flags, texts, capsys
):
    from transformers import AutoTokenizer

    adopted, out = tmp_path / "tok", tmp_path / "out"
    assert run("tokenizer", "--from-hf", hf_folder, "--out", adopted) == 2
    assert "--bos-token" in capsys.readouterr().err and not list(adopted.glob("*"))
    flags = ["--from-hf", hf_folder, "--bos-token", "<|end|>", "--out", adopted]
    for _ in range(2):
        assert run("tokenizer", *flags) == 0
    assert "come back unchanged" in capsys.readouterr().out
    assert run("build", *build_flags, "--tokenizer", adopted, "--out", out) == 0
    manifest = load_manifest(out)
    assert (manifest.tokenizer.type, manifest.bos_id, manifest.eos_id) == ("huggingface", 0, 0)
    assert manifest.pad_id == 1 and manifest.tokenizer_path == (out / "tokenizer/tokenizer.json")
    assert run("verify", out, "--full") == 0 and run("inspect", out, "--row", 3) == 0
    report = json.loads((out / "_work/report.json").read_text())
    assert report["lossy"] == 0 and report["round_trips"] > 50
    ours, theirs = open_tokenizer(out / "tokenizer"), AutoTokenizer.from_pretrained(adopted)
    awkward = [*texts, "a <|end|> spelled out", "", "  \n"]
    for text, ids in zip(awkward, ours.encode(awkward), strict=True):
        assert ours.decode(ids) == text and not {0, 1} & set(ids)
        if "<|end|>" not in text:
            assert ids.tolist() == theirs.encode(text, add_special_tokens=False)
    assert run("tokenizer", "--from-hf", out / "tokenizer", "--out", hf_folder) == 2
    assert "nothing was overwritten" in capsys.readouterr().err


def test_sentencepiece_model_is_adopted_and_special_tokens_stay_out_of_text(
    tmp_path, corpus, tokenizer_dir, capsys
):
    model = shutil.copy(tokenizer_dir / "tokenizer.model", tmp_path / "other.model")
    assert run("tokenizer", "--from-model", model, "--out", tmp_path / "t") == 0
    adopted = (tmp_path / "t/tokenizer.model").read_bytes()
    assert adopted == (tokenizer_dir / "tokenizer.model").read_bytes()
    for wrong in (["--from-model", corpus], [], ["--input", corpus, "--from-hf", tmp_path]):
        assert run("tokenizer", *wrong, "--out", tmp_path / "w") == 2
    flags = ["--input", corpus, "--vocab-size", 340, "--special-tokens", "<|user|>"]
    assert run("tokenizer", *flags, "--out", tmp_path / "s") == 0
    tokenizer = open_tokenizer(tmp_path / "s")
    special = tokenizer._processor.piece_to_id("<|user|>")
    (ids,) = tokenizer.encode(["<|user|> hello"])
    assert special > 3 and special not in ids and tokenizer.decode(ids) == "<|user|> hello"
