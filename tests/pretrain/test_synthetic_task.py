"""A task, from its samples to what a model has learnt: the commands of docs/synthetic.md."""

import json

import pytest

from pretrain import cli, layout
from tests.data_prep import small_corpus
from xlstm_mcore.convert import cli as convert

RUN = """\
run: {dir: RUN, steps: 60, seed: 1}
model: {pattern: ss, hidden_size: 16, num_heads: 1, vocab_size: 3}
data: {path: tasks/parity/train, seq_len: 12, global_batch: 16, micro_batch: 8}
optimizer: {lr: 1.0e-2}
schedule: {name: constant}
checkpoint: {interval: 60}
evaluation: {interval: 60}
logging: {interval: 60, tensorboard: false}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Parities of one and two letters, which are learnt at once."""
    folder = tmp_path_factory.mktemp("task")
    (folder / "run.yaml").write_text(RUN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flags = ["--length", "2-8", "--seq-len", 12, "--validation-length", "24", "--dense"]
        flags += ["--samples", 4000, "--validation-samples", 200, "--out", "tasks/parity"]
        assert small_corpus.run("synthetic", "parity", *flags) == 0
        assert command("train", "run.yaml") == 0
    return folder


def command(*words):
    layout.leave()
    try:
        return cli.run(list(words))
    finally:
        layout.leave()


def test_evaluation_shows_accuracy_at_lengths_of_training_and_beyond(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert command("evaluate", "RUN", "--by", "length") == 0
    shown = capsys.readouterr().out
    assert ", accuracy 0." in shown or ", accuracy 1." in shown
    assert " of 200 samples exact" in shown and "  length             4-7  " in shown
    far = ["--data.path", "tasks/parity/validation-24", "--data.seq-len", "24"]
    assert command("evaluate", "RUN", *far, "--by", "position", "--json") == 0
    (one,) = json.loads(capsys.readouterr().out)["sets"].values()
    assert one["tokens"] == 200 * 24 and one["samples"] == 200
    places = one["position"]
    assert list(places) == ["1", "2-3", "4-7", "8-15", "16-31"]
    assert places["1"]["accuracy"] > 0.95 > places["16-31"]["accuracy"]
    assert all(0 < group["loss"] for group in places.values())


def test_prompts_are_symbols(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    words = ["generate", "RUN", "--max-tokens", "3", "--temperature", "0", "--prompt"]
    assert command(*words, "a b b", "--json") == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert len(text.split()) == 3 and set(text.split()) <= {"a", "b", "_"}
    assert command(*words, "a c b") == 2
    assert "'c' is not a symbol" in capsys.readouterr().err


def test_a_model_of_a_task_is_not_exported(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert convert.main(["to-hf", "RUN", "out"]) == 2
    assert "the symbols of a synthetic task" in capsys.readouterr().err
