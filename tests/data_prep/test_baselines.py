import json
import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

import data_prep.tools.ngram_baselines
from data_prep.tools.ngram_baselines import count_pairs, evaluate_models
from tests.data_prep.small_corpus import documents_of, run
from xlstm_io.shards.manifest import load_manifest
from xlstm_io.tokenizer import open_tokenizer


def discounts_of(counts):
    n = Counter(counts)
    y = n[1] / (n[1] + 2 * n[2])
    found = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
    assert all(0 < d < k for k, d in enumerate(found, 1))  # no special case of tiny corpora
    return found


def slow_models(train, valid, size):
    """The three models with dictionaries, straight from their definitions."""
    pair, single, context = (
        Counter(train),
        Counter(v for _, v in train),
        Counter(u for u, _ in train),
    )
    followers, befores = defaultdict(list), defaultdict(set)
    for (u, v), count in pair.items():
        followers[u].append(count)
        befores[v].add(u)
    d = [0, *discounts_of(pair.values())]
    low = [0, *discounts_of([len(b) for b in befores.values()])]

    def lose(count, table):
        return table[min(count, 3)]

    total = len(pair)
    mass = sum(lose(len(b), low) for b in befores.values()) / total

    def lower(v):
        count = len(befores[v]) if v in befores else 0
        return (count - lose(count, low)) / total + mass / size

    def kneser_ney(u, v):
        if not context[u]:
            return lower(v)
        gamma = sum(lose(c, d) for c in followers[u]) / context[u]
        return (pair[u, v] - lose(pair[u, v], d)) / context[u] + gamma * lower(v)

    models = {
        "unigram": lambda u, v: (single[v] + 1) / (len(train) + size),
        "bigram_add_one": lambda u, v: (pair[u, v] + 1) / (context[u] + size),
        "bigram_kneser_ney": kneser_ney,
    }
    for model in models.values():  # each is a distribution, in seen and unseen contexts
        for u in (train[0][0], size - 1):
            assert sum(model(u, v) for v in range(size)) == pytest.approx(1)
    return {
        name: -sum(math.log(model(u, v)) for u, v in valid) / len(valid)
        for name, model in models.items()
    }


def test_random_pairs_equal_the_slow_models(monkeypatch):
    rng = np.random.default_rng(1)
    size = 500
    train = np.minimum(rng.geometric(0.02, (5000, 2)), size - 3)
    valid = np.minimum(rng.geometric(0.015, (400, 2)), size - 1)
    code = (train[:, 0] * size + train[:, 1]).astype(np.uint64)
    monkeypatch.setattr(data_prep.tools.ngram_baselines, "_MERGE_PAIRS", 700)  # merge several times
    pairs, counts = count_pairs(iter(np.array_split(code, 9)), size)
    assert dict(zip(pairs.tolist(), counts.tolist(), strict=True)) == Counter(code.tolist())
    fast, _ = evaluate_models(
        pairs, counts, (valid[:, 0] * size + valid[:, 1]).astype(np.uint64), size
    )
    slow = slow_models([tuple(p) for p in train], [tuple(p) for p in valid], size)
    for name, value in slow.items():
        assert fast[name] == pytest.approx(value, rel=1e-12)


def test_command_counts_exactly_the_targets_of_the_loss(shards, tmp_path, capsys):
    file = tmp_path / "b.json"
    assert run("baselines", shards, "--out", file) == 0
    result = json.loads(file.read_text())
    manifest = load_manifest(shards)
    tokenizer = open_tokenizer(manifest.tokenizer_path)

    def pairs(split):
        for ids in tokenizer.encode(documents_of(shards, split)):
            full = [manifest.bos_id, *ids, manifest.eos_id]
            yield from pairwise(full)

    train, valid = list(pairs("train")), list(pairs("valid"))
    assert result["train_targets"] == len(train) == manifest.sources[0].splits["train"].targets
    assert result["valid_targets"] == len(valid)
    for name, value in slow_models(train, valid, manifest.vocab_size).items():
        assert result[name] == pytest.approx(value, rel=1e-9)
    assert f"{result['bigram_kneser_ney']:.3f}" in capsys.readouterr().out


def test_no_validation_split_is_refused(tmp_path, build_flags, capsys):
    assert run("build", *build_flags, "--valid-fraction", 0, "--out", tmp_path / "o") == 0
    assert run("baselines", tmp_path / "o") == 2
    assert "--valid-fraction" in capsys.readouterr().err
