"""The command: folders, seeds, rows, two splits without a sample in common, and its messages."""

import json

import numpy as np
import pytest

from benchmarks.data_prep import synthetic_tasks
from data_prep.synthetic.command import TASKS
from data_prep.synthetic.rows import assign
from data_prep.tools.inspect_shards import show_row
from tests.data_prep.small_corpus import run, tree_bytes
from tests.data_prep.synthetic.definitions import SOLVED, SOLVED_DENSE, digits_file
from tests.data_prep.synthetic.stored import samples_of
from tests.house.documents import commands, read
from xlstm_io.errors import UserError
from xlstm_io.shards.manifest import load_manifest
from xlstm_io.tokenizer import open_tokenizer

FEW = ("--samples", 60, "--validation-samples", 20)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "listops"])
def test_shards_verify_and_hold_the_task(name, tmp_path, capsys):
    own = ("--images", digits_file(tmp_path)) if name == "digits" else ()
    assert run("synthetic", name, "--out", tmp_path, *FEW, *own) == 0
    for split, count in (("train", 60), ("valid", 20)):
        samples = samples_of(tmp_path / "train", split)
        assert len(samples) == count
        for symbols, labels in samples:
            assert labels == SOLVED[name](symbols)
    assert run("verify", tmp_path / "train", "--full") == 0
    assert run("inspect", tmp_path / "train") == 0
    assert "with labels" in capsys.readouterr().out


def test_list_operations_of_chosen_depth(tmp_path):
    options = ("--length", "8-40", "--max-depth", 3, "--max-args", 4)
    assert run("synthetic", "listops", "--out", tmp_path, *FEW, *options) == 0
    samples = samples_of(tmp_path / "train", "train")
    assert len(samples) == 60 and all(8 <= len(symbols) <= 40 for symbols, _ in samples)
    assert all(labels == SOLVED["listops"](symbols) for symbols, labels in samples)


def test_no_sample_is_for_training_and_for_validation(tmp_path):
    """Of the 126 strings of two letters with one to six of them every one is in one split."""
    options = ("--samples", 4000, "--validation-samples", 400)
    both = []
    for seed in (0, 1):
        out = tmp_path / str(seed)
        lengths = ("--length", "1-6", "--validation-length", "6", "1-7")
        assert run("synthetic", "parity", "--out", out, *options, *lengths, "--seed", seed) == 0
        split = {k: {tuple(s) for s, _ in samples_of(out / "train", k)} for k in ("train", "valid")}
        for other in ("validation-6", "validation-1-7"):
            split["valid"] |= {tuple(s) for s, _ in samples_of(out / other, "valid")}
        both.append(split)
    train = both[0]["train"] | both[1]["train"]
    valid = both[0]["valid"] | both[1]["valid"]
    assert not train & valid
    assert len([sample for sample in train | valid if len(sample) <= 6]) == 126
    assert {len(sample) for sample in valid} >= {4, 5, 6, 7}


def test_folders_lengths_and_dense_labels(tmp_path):
    lengths = ("--length", "3-9", "--validation-length", "32", "--seq-len", 20)
    assert run("synthetic", "parity", "--out", tmp_path, *FEW, *lengths, "--dense") == 0
    train, far = (load_manifest(tmp_path / name) for name in ("train", "validation-32"))
    assert (train.seq_len, far.seq_len) == (20, 32)
    assert train.split_names() == ["train", "valid"] and far.split_names() == ["valid"]
    assert train.tokenizer_sha256 == far.tokenizer_sha256
    assert all(len(symbols) == 32 for symbols, _ in samples_of(tmp_path / "validation-32", "valid"))
    for symbols, labels in samples_of(tmp_path / "train", "train"):
        assert labels == SOLVED_DENSE["parity"](symbols)


def test_a_seed_is_the_corpus_and_the_command_is_done_once(tmp_path, capsys):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run("synthetic", "parity", "--out", tmp_path / folder, *FEW, "--seed", seed) == 0
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")
    assert tree_bytes(tmp_path / "a") != tree_bytes(tmp_path / "c")
    capsys.readouterr()
    assert run("synthetic", "parity", "--out", tmp_path / "a", *FEW, "--seed", 0) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run("synthetic", "parity", "--out", tmp_path / "a", *FEW, "--seed", 1) == 2
    assert "holds other shards or settings" in capsys.readouterr().err


def test_a_corpus_of_several_shards_and_blocks_is_the_same(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ("--samples", 3000, "--validation-samples", 20)
    monkeypatch.setattr("data_prep.synthetic.corpus._BATCH_TOKENS", 4000)
    assert run("synthetic", "parity", "--out", whole, *options) == 0
    monkeypatch.setattr("data_prep.synthetic.corpus._SHARD_TOKENS", 9000)
    monkeypatch.setattr("data_prep.synthetic.rows.default_block_rows", lambda *size: 50)
    assert run("synthetic", "parity", "--out", cut, *options) == 0
    assert len(load_manifest(cut / "train").shards("train")) > 3
    assert run("verify", cut / "train", "--full") == 0
    assert samples_of(cut / "train", "train") == samples_of(whole / "train", "train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("party", "--out", "x"), "there is no task 'party'; did you mean parity?"),
        (("parity", "--out", "x", "--dens"), "did you mean --dense"),
        (("mqar", "--out", "x", "--dense"), "there is no option --dense"),
        (("parity", "--out", "x", "--length", "9-3"), "--length 9-3: the first length"),
        (("parity", "--out", "x", "--length", "many"), "--length many: write a length such as 64"),
        (("parity", "--out", "x", "--length", "9999999"), "at most 1048576 tokens"),
        (("parity", "--out", "x", "--seed", "-1"), "--seed -1"),
        (("parity", "--out", "x", "--samples", "0"), "--samples 0"),
        (("parity", "--out", "x", "--seq-len", "20"), "--seq-len 20 holds no sample of 40"),
        (("repetition", "--out", "x", "--length", "7"), "there are no samples of 7 tokens"),
        (("mqar", "--out", "x", "--length", "12"), "at least four for each pair"),
        (("mqar", "--out", "x", "--vocab-size", "8"), "--pairs 4 of --vocab-size 8"),
        (("listops", "--out", "x", "--max-depth", "1"), "--max-depth 1"),
        (("parity", "--out", "x", "--length", "1"), "--length 1: none of"),
    ],
)
def test_wrong_words_are_one_message(arguments, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data_prep.synthetic.corpus._FRUITLESS_BATCHES", 3)
    monkeypatch.setattr("data_prep.synthetic.corpus._BATCH_TOKENS", 100)
    assert run("synthetic", *arguments) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "none.csv cannot be read"),
        ("words.csv", b"a,b", "not a table of whole numbers"),
        ("short.csv", b"1,2,3", "64 grey values and a digit"),
        ("white.csv", b"255," * 64 + b"7", "from 0 to 16"),
        ("cut.csv.gz", b"\x1f\x8b\x08\x00", "not a table of whole numbers"),
        ("empty.csv", b"", "64 grey values and a digit"),
    ],
)
def test_a_wrong_file_of_images_is_one_message(name, content, message, tmp_path, capfd):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert run("synthetic", "digits", "--out", tmp_path / "out", "--images", path) == 2
    assert message in capfd.readouterr().err


def test_images_without_scikit_learn_are_one_message(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("data_prep.synthetic.images._PACKAGE", "no_such_package")
    assert run("synthetic", "digits", "--out", tmp_path / "out") == 2
    assert "pip install scikit-learn" in capfd.readouterr().err


def test_the_tasks_are_listed(capsys):
    assert run("synthetic") == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in TASKS)
    assert run("synthetic", "mqar", "--help") == 0
    assert "--pairs" in capsys.readouterr().out


def test_rows_are_filled_and_no_sample_is_cut():
    lengths = np.random.default_rng(0).integers(3, 41, 5000)
    row, start = assign(lengths, 40)
    parts = ((start[row == n], lengths[row == n]) for n in range(row.max() + 1))
    held = [sorted(zip(*part, strict=True)) for part in parts]
    assert all(places[0][0] == 0 for places in held)
    for places in held:
        ends = [begin + length for begin, length in places]
        assert [begin for begin, _ in places[1:]] == ends[:-1] and ends[-1] <= 40
    assert lengths.sum() / (40 * len(held)) > 0.97


def test_the_benchmark_has_a_line_for_each_task(capsys):
    synthetic_tasks.main(["--seconds", "0.01", "--tokens", "2000"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(TASKS)


def test_symbols_are_read_and_written_with_blanks(tmp_path):
    assert run("synthetic", "cycle-nav", "--out", tmp_path, *FEW) == 0
    tokenizer = open_tokenizer(tmp_path / "train" / "tokenizer")
    (ids,) = tokenizer.encode(["STAY +1 -1  P4"])
    assert ids.tolist() == [1, 2, 3, 8] == tokenizer.prompt_ids("STAY +1 -1 P4")
    assert tokenizer.decode(ids) == "STAY +1 -1 P4"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (None, None, 9)
    with pytest.raises(UserError, match=r"'LEFT' is not a symbol of .*symbols\.json; it has _"):
        tokenizer.encode(["STAY LEFT"])
    shown = show_row(tmp_path / "train", 0)
    assert "STAY" in shown and "labels of" in shown
    damaged = tmp_path / "symbols.json"
    for content in ("[]", '{"symbols": ["a", "a"]}', '{"symbols": ["a b"]}', "x"):
        damaged.write_text(content)
        with pytest.raises(UserError, match="is not a list of symbols"):
            open_tokenizer(damaged)


def test_samples_are_not_packed_again(tmp_path, capsys):
    assert run("synthetic", "parity", "--out", tmp_path, *FEW) == 0
    assert run("repack", tmp_path / "train", "--seq-len", 80) == 2
    assert "python -m data_prep synthetic" in capsys.readouterr().err
    state = json.loads((tmp_path / "train" / "_work" / "synthetic.json").read_text())
    assert state["task"] == "parity"


def test_the_commands_of_the_page(tmp_path, monkeypatch, capsys):
    """As docs/synthetic.md shows them, with fewer samples."""
    monkeypatch.chdir(tmp_path)
    page = commands("docs/synthetic.md")
    make = next(words for words in page if " --dense" in words)
    show = next(words for words in page if " inspect " in words)
    assert run(*make.split()[3:], *FEW) == 0
    capsys.readouterr()
    assert run(*show.split()[3:]) == 0
    assert "labels of 0..39: " in capsys.readouterr().out
    folders = sorted(path.name for path in tmp_path.glob("tasks/parity/*"))
    assert folders == ["train", "validation-256"]


def test_the_table_of_the_page_is_the_tasks():
    """Examples are solved by the definitions, and the numbers are those of the tasks."""
    rows = [line.strip("| ").split(" | ") for line in read("docs/synthetic.md").splitlines()]
    table = {row[0].strip("`"): row for row in rows if len(row) == 5 and row[0][0] == "`"}
    assert list(table) == list(TASKS)
    for name, (_, shown, answer, symbols, chance) in table.items():
        task = TASKS[name](out="unused")
        assert len(task.symbols()) == int(symbols)
        if name != "mqar":
            assert task.chance == pytest.approx(1 / int(chance.removeprefix("1/")))
            words = shown.split("`")[1].split()
            assert set(words) <= set(task.symbols())
            if name != "digits":  # people have labelled them
                labels = SOLVED[name](words).values()
                assert list(labels) == answer.split("`")[1].split()
