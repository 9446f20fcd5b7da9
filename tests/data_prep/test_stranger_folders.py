"""Folders from others: their build state runs no code and leads nowhere; damage is redone."""

import json
import os
import shutil
from pathlib import Path

import pytest

from data_prep.build.notes import read_note, write_note
from data_prep.build.state import STATE_NAME
from tests.data_prep.small_corpus import run, tree_bytes, write_jsonl
from xlstm_io.foreign.json_file import StrictModel


@pytest.fixture
def copy(shards, tmp_path) -> Path:
    return shutil.copytree(shards, tmp_path / "copy")


def rewrite(path: Path, change) -> None:
    """A note with other fields and the right checksum, as a stranger would write it."""
    fields = json.loads(path.read_bytes())
    del fields["checksum"]
    change(fields)
    write_note(path, fields)


def plans(folder: Path) -> list[Path]:
    return list((folder / "_work/plan").glob("*.json"))


# --- code ----------------------------------------------------------------------------------------


def test_a_file_of_settings_cannot_allow_itself_to_run_code(tmp_path, capsys, monkeypatch):
    (tmp_path / "hostile.py").write_text("import os\nos.mkdir('ran')\ndef f(text): return True\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    settings = "input: a.jsonl\ntokenizer: t\nout: o\nfilter_functions: ['hostile:f']\n"
    for text, words in (
        (settings, "allow it in this call with --allow-functions"),
        (settings + "allow_functions: true\n", "allow_functions is not a key of the file"),
    ):
        (tmp_path / "prep.yaml").write_text(text)
        assert run("build", tmp_path / "prep.yaml") == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_merge_runs_no_function_that_a_build_state_names(copy, capsys, monkeypatch, tmp_path):
    (tmp_path / "hostile.py").write_text("import os\nos.mkdir('ran')\ndef f(text): return True\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (copy / "manifest.json").unlink()

    def change(fields):
        fields["config"] |= {"filter_functions": ["hostile:f"], "allow_functions": True}
        fields["settings"]["filters"] = {"hostile:f": "sha256 0"}

    rewrite(copy / "_work" / STATE_NAME, change)
    assert run("merge", copy) == 2  # no scan was made with that function
    assert not (tmp_path / "ran").exists() and "scans" in capsys.readouterr().err


def test_merge_finishes_a_build_with_functions_without_running_them(
    tmp_path, tokenizer_dir, texts, monkeypatch, capsys
):
    (tmp_path / "mine.py").write_text("def f(text):\n    return 'gate' not in text\n")
    monkeypatch.syspath_prepend(tmp_path)
    corpus, out = write_jsonl(tmp_path / "c.jsonl", texts), tmp_path / "out"
    flags = ["--input", corpus, "--tokenizer", tokenizer_dir, "--valid-fraction", 0.2, "--out", out]
    assert run("build", *flags, "--filter-functions", "mine:f", "--allow-functions") == 0
    assert "runs the function mine:f on every text" in capsys.readouterr().out
    manifest = (out / "manifest.json").read_bytes()
    (out / "manifest.json").unlink()
    monkeypatch.setattr("data_prep.sources.filters.load_function", lambda name: 1 / 0)
    assert run("merge", out) == 0
    assert (out / "manifest.json").read_bytes() == manifest


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../victim", "/tmp/victim", "a/../../victim"])
def test_a_plan_that_names_another_folder_is_made_anew(copy, build_flags, tmp_path, name):
    before = tree_bytes(copy)
    shutil.rmtree(copy / "corpus")
    (copy / "manifest.json").unlink()
    rewrite(plans(copy)[0], lambda fields: fields["shards"][0].__setitem__("source", name))
    assert run("build", *build_flags, "--out", copy) == 0
    assert tree_bytes(copy) == before and sorted(tmp_path.iterdir()) == [copy]


def test_a_record_that_names_another_file_is_not_believed(copy, build_flags):
    before = tree_bytes(copy)
    (copy / "manifest.json").unlink()
    record = next((copy / "_work/done").glob("*.json"))
    rewrite(record, lambda fields: fields["entry"].__setitem__("path", "../victim.tar"))
    assert run("build", *build_flags, "--out", copy) == 0
    assert tree_bytes(copy) == before


@pytest.mark.parametrize("link", ["corpus", "_work"])
def test_a_build_does_not_write_through_a_link_out_of_its_folder(
    build_flags, tmp_path, link, capsys
):
    out, victim = tmp_path / "out", tmp_path / "victim"
    for folder in (out, victim):
        folder.mkdir()
    (out / link).symlink_to(victim)
    assert run("build", *build_flags, "--out", out) == 2
    assert "outside its folder" in capsys.readouterr().err
    assert not list(victim.iterdir())


# --- damage of the build state -------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", ["plan/*.json", "plan/*.fate", "scan/*.json", "scan/*.scan", "done/*.json"]
)
@pytest.mark.parametrize("place", [0.02, 0.5, 0.97])
def test_a_flipped_bit_in_the_build_state_changes_nothing(copy, build_flags, pattern, place):
    """The manifest is gone, as after a kill, so the build goes on from its notes."""
    before = tree_bytes(copy)
    (copy / "manifest.json").unlink()
    for file in (copy / "corpus/train").glob("shard-00000001*"):
        file.unlink()
    # A bucket of a plan may hold no document.
    note = min(file for file in (copy / "_work").glob(pattern) if file.stat().st_size)
    raw = bytearray(note.read_bytes())
    raw[int(place * len(raw))] ^= 1
    note.write_bytes(raw)
    assert run("build", *build_flags, "--out", copy) == 0
    assert tree_bytes(copy) == before


def test_a_damaged_build_state_is_one_message(copy, build_flags, capsys):
    state = copy / "_work" / STATE_NAME
    raw = bytearray(state.read_bytes())
    raw[len(raw) // 2] ^= 1
    state.write_bytes(raw)
    assert run("build", *build_flags, "--out", copy) == 2
    assert "damaged; delete" in capsys.readouterr().err


class _Note(StrictModel):
    count: int


def test_a_note_without_checksum_is_of_an_older_version(tmp_path):
    (tmp_path / "note").write_text('{"count": 3}')
    assert read_note(_Note, tmp_path / "note").count == 3
    (tmp_path / "note").write_text('{"count": 3, "checksun": "0"}')
    assert read_note(_Note, tmp_path / "note") is None
    os.truncate(tmp_path / "note", 1 << 29)
    assert read_note(_Note, tmp_path / "note") is None


# --- what is not a file, and what is too large ---------------------------------------------------


@pytest.mark.parametrize("name", ["SOURCE.json", "state.json"])
@pytest.mark.parametrize("kind", ["pipe", "large"])
def test_a_note_beside_the_corpus_is_small_and_a_file(
    tmp_path, tokenizer_dir, texts, capsys, name, kind
):
    corpus = tmp_path / "in"
    corpus.mkdir()
    write_jsonl(corpus / "a.jsonl", texts)
    (corpus / "dataset_info.json").write_text("{}")
    if kind == "pipe":
        os.mkfifo(corpus / name)
    else:
        (corpus / name).touch()
        os.truncate(corpus / name, 2 << 20)
    flags = ["--tokenizer", tokenizer_dir, "--valid-fraction", 0.2, "--out", tmp_path / "out"]
    code = run("build", "--input", corpus, *flags)
    said = capsys.readouterr().err
    if (name, kind) == ("state.json", "pipe"):
        assert code == 0  # a folder stands for its plain files
    else:
        assert code == 2 and f"{name}: cannot be read" in said


@pytest.mark.parametrize("command", ["build", "tokenizer", "collect"])
def test_a_pipe_as_input_does_not_wait_for_ever(tmp_path, tokenizer_dir, texts, capsys, command):
    write_jsonl(tmp_path / "a.jsonl", texts)
    os.mkfifo(tmp_path / "b.jsonl")
    more = ["--tokenizer", tokenizer_dir] if command == "build" else []
    inputs = ["--input", tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert run(command, *inputs, *more, "--out", tmp_path / "out") == 2
    assert "b.jsonl: a pipe or device, not a file" in capsys.readouterr().err


def test_verify_compares_the_tokenizer_with_the_manifest(copy, capsys):
    from xlstm_io.shards.manifest import write_manifest

    fields = json.loads((copy / "manifest.json").read_bytes())
    fields["tokenizer"]["vocab_size"] += 7
    fields["eos_id"] += 1
    write_manifest(copy, fields)
    assert run("verify", copy, "--full") == 2
    said = capsys.readouterr().out
    assert "vocab_size=330, the manifest says 337" in said and "eos_id=" in said
