"""Files added to a finished build, and sources renamed: the old shards stay as they are."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.build.extend import kept_hashes
from tests.data_prep.small_corpus import documents_of, make_texts, run, tree_bytes, write_jsonl
from xlstm_io.shards.manifest import load_manifest

MORE = make_texts(60, seed=5)


@pytest.fixture
def flags(tokenizer_dir) -> list:
    return [
        *("--tokenizer", tokenizer_dir, "--seq-len", 16, "--valid-fraction", 0.2),
        *("--shard-mb", 0.005, "--workers", 1),
    ]


@pytest.fixture
def more(tmp_path, texts) -> Path:
    """New texts, among them some of the old."""
    return write_jsonl(tmp_path / "more.jsonl", [*MORE[:30], *texts[:10], *MORE[30:]])


def shard_files(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree_bytes(folder).items() if name.startswith("corpus/")}


def both(folder: Path) -> tuple[list[str], list[str]]:
    return documents_of(folder, "train"), documents_of(folder, "valid")


def test_new_files_are_added_and_old_shards_keep_their_bytes(
    shards, corpus, more, flags, tmp_path, capsys
):
    before, out = tree_bytes(shards), tmp_path / "new"
    inputs = ["--input", corpus, more]  # the old file may be named again
    assert run("build", *inputs, *flags, "--extends", shards, "--out", out) == 0
    assert "has 1 file of --input already" in capsys.readouterr().out
    assert run("verify", out, "--full") == 0
    assert tree_bytes(shards) == before  # a run on the old folder goes on
    old, new = load_manifest(shards), load_manifest(out)
    assert new.parent == old.hash and old.parent is None and new.hash != old.hash
    files = shard_files(out)
    assert all(files[name] == data for name, data in shard_files(shards).items())
    for split in ("train", "valid"):
        count = len(old.shards(split))
        assert new.shards(split)[:count] == old.shards(split)
        numbers = [int(entry.path[-12:-4]) for entry in new.shards(split)]
        assert numbers == list(range(len(numbers)))
    (was,), (now,) = both(shards)[:1], both(out)[:1]
    assert now[: len(was)] == was and both(out)[1][: len(both(shards)[1])] == both(shards)[1]
    added = sorted([*now[len(was) :], *both(out)[1][len(both(shards)[1]) :]])
    assert added == sorted(set(MORE) - set(was) - set(both(shards)[1]))
    assert new.sources[0].dropped["duplicate"] >= old.sources[0].dropped["duplicate"] + 10
    capsys.readouterr()
    assert run("build", *inputs, *flags, "--extends", shards, "--out", out) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_result_is_extended_in_turn_when_the_first_folder_is_gone(
    shards, more, flags, tmp_path, texts
):
    first = shutil.copytree(shards, tmp_path / "first")
    again = write_jsonl(tmp_path / "again.jsonl", [texts[0], MORE[0], "a text of its own " * 5])
    assert run("build", "--input", more, *flags, "--extends", first, "--out", tmp_path / "2") == 0
    shutil.rmtree(first)
    last = ["--input", more, again, *flags, "--extends", tmp_path / "2", "--out", tmp_path / "3"]
    assert run("build", *last) == 0
    train, valid = both(tmp_path / "3")
    assert len(train) + len(valid) == len(set(train) | set(valid))
    assert sum(map(len, kept_hashes(tmp_path / "3"))) == len(train) + len(valid)
    old = set(both(tmp_path / "2")[0]) | set(both(tmp_path / "2")[1])
    assert {*train, *valid} - old == {"a text of its own " * 5}


def test_several_jobs_extend_as_one_does(shards, more, flags, tmp_path):
    common = ["--input", more, *flags, "--extends", shards]
    assert run("build", *common, "--out", tmp_path / "one") == 0
    for task in (1, 0):
        out = ["--out", tmp_path / "two", "--task", task, "--tasks", 2]
        assert run("build", *common, *out) == 0
    assert run("merge", tmp_path / "two") == 0
    assert tree_bytes(tmp_path / "one") == tree_bytes(tmp_path / "two")


def test_a_new_source_beside_the_old_ones(shards, more, flags, tmp_path):
    out = tmp_path / "out"
    one = ["--input", more, "--source", "web", *flags, "--extends", shards, "--out", out]
    assert run("build", *one) == 0
    assert [source.name for source in load_manifest(out).sources] == ["corpus", "web"]
    assert load_manifest(out).sources[0] == load_manifest(shards).sources[0]


def test_what_cannot_be_extended_is_one_message(shards, corpus, more, flags, tmp_path, capsys):
    def refused(*words) -> str:
        assert run("build", "--input", more, *flags, *words) == 2
        return capsys.readouterr().err

    new = ("--out", tmp_path / "new")
    assert "choose another --out" in refused("--extends", shards, "--out", shards)
    assert "seq_len 16 -> 32" in refused("--extends", shards, "--seq-len", 32, *new)
    assert "is not a folder of shards" in refused("--extends", tmp_path / "none", *new)
    assert run("build", "--input", more, *flags, "--out", tmp_path / "other") == 0
    capsys.readouterr()
    other = tree_bytes(tmp_path / "other")
    assert "does not extend" in refused("--extends", shards, "--out", tmp_path / "other")
    assert tree_bytes(tmp_path / "other") == other
    bare = shutil.copytree(shards, tmp_path / "bare", ignore=shutil.ignore_patterns("_work"))
    assert "build state (_work) is gone" in refused("--extends", bare, *new)
    assert run("build", "--input", corpus, *flags, "--extends", shards, *new) == 2
    assert "nothing to add" in capsys.readouterr().err


def test_a_changed_old_file_is_not_taken_for_a_new_one(texts, more, flags, tmp_path, capsys):
    old = write_jsonl(tmp_path / "old.jsonl", texts)
    assert run("build", "--input", old, *flags, "--out", tmp_path / "first") == 0
    write_jsonl(old, texts[1:])
    words = ["--extends", tmp_path / "first", "--out", tmp_path / "new"]
    assert run("build", "--input", old, more, *flags, *words) == 2
    assert "old.jsonl has changed since" in capsys.readouterr().err


# --- names of sources ----------------------------------------------------------------------------


def test_a_source_is_renamed_without_a_rebuild(shards, tmp_path):
    out = tmp_path / "out"
    assert run("merge", out, "--inputs", shards, "--rename", "corpus=web") == 0
    assert run("verify", out, "--full") == 0
    old, new = load_manifest(shards), load_manifest(out)
    assert new.sources[0].name == "web" and new.hash != old.hash
    entry = new.shards("train")[0]
    assert entry.path == "web/train/shard-00000000.tar"
    assert (out / entry.path).samefile(shards / old.shards("train")[0].path)
    assert both(out) == both(shards)


def test_folders_with_a_source_of_the_same_name_are_joined(shards, more, flags, tmp_path, capsys):
    other, out = tmp_path / "other", tmp_path / "out"
    assert run("build", "--input", more, *flags, "--out", other) == 0
    join = ["merge", out, "--inputs", shards, other, "--allow-duplicates"]
    assert run(*join) == 2
    assert f"--rename {other}/corpus=NEW" in capsys.readouterr().err
    assert run(*join, "--rename", f"{other}/corpus=more") == 0
    assert [source.name for source in load_manifest(out).sources] == ["corpus", "more"]
    assert run("verify", out, "--full") == 0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("corpus", "write OLD=NEW"),
        ("corpus=../x", "write OLD=NEW"),
        ("corpus=tokenizer", "write OLD=NEW"),
        ("wiki=web", "there is no such source; there are corpus"),
    ],
)
def test_a_wrong_name_is_one_message(shards, tmp_path, capsys, word, message):
    assert run("merge", tmp_path / "out", "--inputs", shards, "--rename", word) == 2
    assert message in capsys.readouterr().err


def test_repeated_texts_are_counted_in_the_file_that_repeats_them(tmp_path, monkeypatch):
    import data_prep.build.repeated as module
    from xlstm_io.storage import temporary_path

    # Left by a killed process, which had the number of this one in another container.
    temporary_path(tmp_path / "buckets").mkdir()

    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 50, (400, 2)).astype(np.uint64)
    hashes[:, 0] <<= np.uint64(58)
    expected = {n for n in range(400) if (hashes[:n] == hashes[n]).all(axis=1).any()}
    parts = [(np.arange(n, n + 40), hashes[n : n + 40]) for n in range(0, 400, 40)]
    for rows in (1 << 20, 16):
        monkeypatch.setattr(module, "BUCKET_ROWS", rows)
        found = [n for part in module.find_repeated(parts, 400, tmp_path) for n in part]
        assert set(found) == expected and len(found) == len(expected)
