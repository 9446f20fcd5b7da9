"""The loss of validation sets: weighted by tokens, in bits per byte, by position and length."""

import json
import math
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from benchmarks.loader.synthetic_shards import write_shards
from pretrain.commands.after_run import evaluate
from pretrain.data import ValidLoader, open_valid
from pretrain.engines.base import LossSum, mean_of
from pretrain.evaluation import answers, losses
from tests.data_prep import small_corpus
from tests.data_prep.synthetic.stored import samples_of
from tests.pretrain.run_files import config
from tests.xlstm_mcore.test_generation_state import make_model
from xlstm_io.errors import ConfigError

SEQ_LEN = 24


def losses_of(tokens, boundaries, labels):
    """A model whose loss is told by the label."""
    return (labels % 7).float()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(
        folder, {"a": [4], "b": [4]}, seq_len=SEQ_LEN, vocab_size=96, valid_rows=5,
        document_tokens=9,
    )  # fmt: skip
    return config(data__path=str(folder), data__seq_len=SEQ_LEN, data__micro_batch=2)


@pytest.fixture(scope="module")
def dataset(run):
    (only,) = open_valid(run.data).values()
    return only


def one_by_one(dataset, by):
    """Power of two -> losses of its tokens, counted in a loop."""
    found = {}
    for batch in ValidLoader(dataset, micro_batch=2):
        for labels, mask, starts in zip(
            batch.labels, batch.loss_mask, batch.boundaries, strict=True
        ):
            begin = [s for s in range(SEQ_LEN) if s == 0 or starts[s]] + [SEQ_LEN]
            for first, end in pairwise(begin):
                for place in range(first, end):
                    size = place - first + 1 if by == "position" else end - first
                    if mask[place]:
                        group = found.setdefault(int(math.log2(size)), [])
                        group.append(float(labels[place] % 7))
    return found


@pytest.mark.parametrize("by", ["position", "length"])
def test_tokens_are_sorted_by_their_place_or_their_documents_length(run, dataset, by):
    got = losses.measure(losses_of, dataset, run, by)
    expected = one_by_one(dataset, by)
    assert len(expected) > 3
    assert got.by == {n: LossSum(sum(each), len(each)) for n, each in sorted(expected.items())}
    whole = losses.measure(losses_of, dataset, run)
    assert whole.by == {} and whole.sum == got.sum
    assert whole.sum.total == sum(map(sum, expected.values()))


def test_tokens_are_sorted_by_how_often_they_are_targets(run, dataset):
    expected, counts = {}, Counter()
    batches = list(ValidLoader(dataset, micro_batch=2))
    for batch in batches:
        counts.update(batch.labels[batch.loss_mask > 0].tolist())
    for batch in batches:
        for label in batch.labels[batch.loss_mask > 0].tolist():
            group = expected.setdefault(int(math.log2(counts[label])), [])
            group.append(float(label % 7))
    got = losses.measure(losses_of, dataset, run, "frequency")
    assert got.by == {n: LossSum(sum(each), len(each)) for n, each in sorted(expected.items())}
    assert len(expected) > 1


@pytest.fixture(scope="module")
def long_documents(tmp_path_factory):
    """A run on rows that continue each other, and its validation set."""
    shards = small_corpus.make_shards(tmp_path_factory.mktemp("long"))
    run = config(data__path=str(shards), data__seq_len=16, data__micro_batch=2)
    (dataset,) = open_valid(run.data).values()
    return run, dataset


@torch.no_grad()
@pytest.mark.parametrize("times", [2, 4])
def test_longer_rows_are_those_of_one_pass_over_joined_rows(long_documents, times):
    """The state is carried: the loss is that of the model on rows of so many times the length."""
    run, dataset = long_documents
    model = make_model("Mms*", vocab_size=336)
    got = losses.measure(model, dataset, run, "position", times)
    tokens, boundaries, labels, mask = (
        torch.cat([getattr(batch, name) for batch in ValidLoader(dataset, micro_batch=1)])
        for name in ("tokens", "boundaries", "labels", "loss_mask")
    )
    total = 0.0
    for first in range(0, len(tokens), times):
        joined = [
            part[first : first + times].reshape(1, -1) for part in (tokens, boundaries, labels)
        ]
        total += (model(*joined) * mask[first : first + times].reshape(1, -1)).sum().item()
    assert got.sum.tokens == int(mask.sum())
    assert got.sum.total == pytest.approx(total, rel=1e-5)
    assert sum(group.tokens for group in got.by.values()) == got.sum.tokens
    alone = losses.measure(model, dataset, run)
    assert abs(alone.sum.total - total) > 1e-4 * total  # what came before matters
    assert max(got.by) > max(losses.measure(model, dataset, run, "position").by)


def test_rows_that_do_not_continue_each_other_are_refused():
    manifest = SimpleNamespace(packing="best_fit", labels=False, root="shards")
    with pytest.raises(ConfigError, match="packing=best_fit, and its rows do not continue"):
        evaluate._check_rows_continue(SimpleNamespace(manifest=manifest))


def test_bits_per_byte_are_those_of_the_text(run, dataset):
    got = losses.measure(losses_of, dataset, run)
    entries = dataset.manifest.shards("valid")
    size = sum(entry.bytes_in for entry in entries)
    assert got.sum.tokens == sum(entry.targets for entry in entries)
    assert got.bits_per_byte == pytest.approx(got.sum.total / math.log(2) / size)


def test_a_set_counts_as_much_as_it_has_tokens():
    assert mean_of([LossSum(10.0, 5), LossSum(90.0, 15)]) == 5.0
    assert math.isnan(mean_of([]))  # no loss, which is not a loss of 0


def test_text_and_json_name_every_set(run):
    sets = evaluate._sources_apart(run).data.valid
    assert [(one.name, one.source) for one in sets] == [("a", "a"), ("b", "b")]
    found = {
        name: losses.SetLoss(LossSum(total, tokens), 0.5, {0: LossSum(1.0, 1), 3: LossSum(9, 4)})
        for name, total, tokens in (("a", 10.0, 5), ("b", 90.0, 15))
    }
    text = evaluate._as_text("ckpt", found, "position")
    assert "ckpt, a: 2.0000 nats per token, perplexity 7.39, 1.4427 bits per byte" in text
    assert "position" in text and "8-15   2.2500 nats per token,  4 tokens" in text
    assert "mean of the 2 sets, by their tokens: 5.0000 nats per token" in text
    body = json.loads(evaluate._as_json("ckpt", found, "position"))
    assert body["loss"] == 5.0 and body["sets"]["b"]["loss"] == 6.0
    assert body["sets"]["b"]["position"] == {
        "1": {"loss": 1.0, "tokens": 1},
        "8-15": {"loss": 2.25, "tokens": 4},
    }


def test_a_model_that_has_diverged_has_a_perplexity_too():
    assert losses.SetLoss(LossSum(3000.0, 4), None).perplexity == math.inf
    assert math.isnan(losses.SetLoss(LossSum(math.nan, 4), None).perplexity)
    assert math.isnan(losses.SetLoss(LossSum(0.0, 0), None).perplexity), "of no token there is none"


def test_json_of_a_loss_that_is_no_number_can_be_read_by_others():
    found = {
        "": losses.SetLoss(LossSum(0.0, 0), 0.5, {3: LossSum(math.inf, 4)}),
        "far": losses.SetLoss(LossSum(3000.0, 4), 0.5),
    }
    text = evaluate._as_json("ckpt", found, "position")
    body = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert body["sets"][""]["loss"] is body["sets"][""]["bits_per_byte"] is None
    assert body["sets"]["far"] | {"loss": 750.0, "perplexity": None} == body["sets"]["far"]


def test_documents_of_a_row_have_places_and_lengths():
    """The second row ends in padding, which belongs to no document's length."""
    starts = torch.tensor([[0, 0, 1, 0, 0, 1], [1, 0, 1, 0, 0, 0]], dtype=torch.bool)
    document = losses._documents(SimpleNamespace(boundaries=starts))
    assert document.tolist() == [[0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 1, 1]]
    assert losses._positions(document).tolist() == [[1, 2, 1, 2, 3, 1], [1, 2, 1, 2, 3, 4]]
    lengths = losses._lengths(document, torch.arange(6) < torch.tensor([[6], [4]]))
    assert lengths.tolist() == [[2, 2, 3, 3, 3, 1], [2, 2, 2, 2, 2, 2]]


class Guesses:
    """A model that takes every answer for the symbol a, with the logit 2 above the others."""

    config = SimpleNamespace(vocab_tokens=3, vocab_size=5)

    def __call__(self, tokens, boundaries):
        logits = torch.zeros(*tokens.shape, 5)
        logits[..., 1], logits[..., 4] = 2.0, 9.0  # the last ids are not in the vocabulary
        return logits


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    out = tmp_path_factory.mktemp("task")
    flags = ["--length", "3-12", "--seq-len", SEQ_LEN, "--samples", 20, "--validation-samples", 90]
    assert small_corpus.run("synthetic", "parity", "--out", out, *flags, "--dense") == 0
    return out / "train"


@pytest.mark.parametrize("by", [None, "position", "length"])
@pytest.mark.parametrize("rows_at_once", [1, 64])
def test_labels_are_counted_as_right_and_samples_as_exact(task, by, rows_at_once, monkeypatch):
    monkeypatch.setattr(answers, "gather_vocabulary", lambda model, logits: logits)
    monkeypatch.setattr(answers, "_MOST_LOGITS", rows_at_once * SEQ_LEN * 5)
    run = config(data__path=str(task), data__seq_len=SEQ_LEN, data__micro_batch=4)
    (dataset,) = open_valid(run.data).values()
    got = losses.measure(Guesses(), dataset, run, by)

    groups, whole, loss = {}, [0, 0, 0, 0], 0.0
    for symbols, labels in samples_of(task, "valid"):
        right = {place: answer == "a" for place, answer in labels.items()}
        places = {n: int(math.log2(n + 1 if by == "position" else len(symbols))) for n in labels}
        for n, group in places.items():
            each = groups.setdefault(group, [0, 0, 0, 0])
            each[0], each[1] = each[0] + 1, each[1] + right[n]
            loss += math.log(2 + math.exp(2.0)) - 2.0 * right[n]
        if by == "length":
            each = groups[int(math.log2(len(symbols)))]
            each[2], each[3] = each[2] + 1, each[3] + all(right.values())
        counted = (len(labels), sum(right.values()), 1, all(right.values()))
        whole = [total + more for total, more in zip(whole, counted, strict=True)]
    assert whole[0] > whole[1] > 0
    assert got.answers == answers.Answers(*whole)
    assert got.bits_per_byte is None, "a task has no text whose bytes could be counted"
    assert got.sum.tokens == whole[0] and got.sum.total == pytest.approx(loss, rel=1e-5)
    found = {n: (a.labels, a.right, a.samples, a.exact) for n, a in got.answers_by.items()}
    assert found == ({n: tuple(each) for n, each in groups.items()} if by else {})


def test_accuracy_is_told_beside_the_loss():
    right = answers.Answers(100, 75, 10, 4)
    found = {"": losses.SetLoss(LossSum(50.0, 100), None, {3: LossSum(9, 4)}, right, {3: right})}
    text = evaluate._as_text("ckpt", found, "length")
    assert "0.5000 nats per token" in text
    assert "perplexity 1.65, over 100 tokens, accuracy 0.7500, 0.4000 of 10 samples exact" in text
    assert text.endswith("4 tokens, accuracy 0.7500, 0.4000 of 10 samples exact")
    (body,) = json.loads(evaluate._as_json("ckpt", found, "length"))["sets"].values()
    assert (body["accuracy"], body["exact_match"], body["samples"]) == (0.75, 0.4, 10)
    assert "bits_per_byte" not in body
    assert body["length"]["8-15"]["accuracy"] == 0.75
