"""Every generator against the definition of its task, and its distribution against a slow one."""

import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep.synthetic.command import TASKS
from data_prep.synthetic.expressions import expressions
from data_prep.synthetic.listops import _TREES
from data_prep.synthetic.recall import MultiQueryRecall, distinct
from data_prep.synthetic.task import Span
from tests.data_prep.synthetic.definitions import SOLVED, SOLVED_DENSE, digits_file
from xlstm_io.errors import PrepError

OUT = Path("unused")
SPANS = {"mqar": "16-64", "listops": "4-200", "stack": "4-60", "digits": "64"}


@pytest.fixture(autouse=True, scope="module")
def images(tmp_path_factory):
    """Images of our own in the place of scikit-learn's."""
    with pytest.MonkeyPatch.context() as patch:
        file = digits_file(tmp_path_factory.mktemp("images"))
        patch.setattr("data_prep.synthetic.images._shipped", lambda: file)
        yield


def draw(task, count, span, seed=0):
    return task.draw(np.random.default_rng(seed), count, Span.parse(span, "--length"))


def as_symbols(task, samples):
    """Symbols, and labels by position, of each sample."""
    names = task.symbols()
    for tokens, labels, length in zip(
        samples.tokens.tolist(), samples.labels.tolist(), samples.lengths.tolist(), strict=True
    ):
        assert not any(tokens[length:]) and set(labels[length:]) <= {-1}
        given = {n: names[label] for n, label in enumerate(labels) if label >= 0}
        yield [names[token] for token in tokens[:length]], given


def test_every_task_has_a_definition():
    assert list(SOLVED) == list(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_labels_are_those_of_the_definition(name):
    task = TASKS[name](out=OUT)
    samples = draw(task, 3000, SPANS.get(name, "2-60"))
    assert len(samples) > 100
    for symbols, labels in as_symbols(task, samples):
        assert labels == SOLVED[name](symbols), symbols


@pytest.mark.parametrize("name", SOLVED_DENSE)
def test_dense_labels_are_those_of_every_prefix(name):
    task = TASKS[name](out=OUT, dense=True)
    for symbols, labels in as_symbols(task, draw(task, 400, "2-30")):
        assert labels == SOLVED_DENSE[name](symbols), symbols


@pytest.mark.parametrize("name", TASKS)
def test_symbols_are_those_of_the_paper_and_all_occur(name):
    paper = {"parity": 3, "even-pairs": 3, "cycle-nav": 9, "mod-arith": 10, "stack": 11}
    paper |= {"mod-arith-brackets": 12, "solve-equation": 14, "bucket-sort": 11, "set": 128}
    paper |= {"missing-duplicate": 11, "majority": 64, "majority-count": 64, "mqar": 8192}
    paper |= dict.fromkeys(("reverse", "odds-first", "repetition"), 12)
    task = TASKS[name](out=OUT)
    symbols = task.symbols()
    assert len(set(symbols)) == len(symbols) == paper.get(name, len(symbols))
    if name not in ("mqar", "nearest", "majority-count"):
        samples = draw(task, 3000, SPANS.get(name, "2-60"))
        seen = set(samples.tokens.ravel()) | set(samples.labels.ravel())
        unused = {symbols[n] for n in range(len(symbols)) if n not in seen}
        assert unused == {"solve-equation": {"*"}, "digits": {"_"}}.get(name, set())
    if name in paper:
        guesses = {"stack": 4, "mqar": 4, "bucket-sort": 10, "majority": 63, "majority-count": 63}
        guesses |= {"parity": 2, "even-pairs": 2, "missing-duplicate": 9, "set": 126}
        guesses |= dict.fromkeys(("reverse", "odds-first", "repetition"), 10)
        assert task.chance == pytest.approx(1 / guesses.get(name, 5))


@pytest.mark.parametrize("name", [name for name in TASKS if name != "listops"])
def test_lengths_are_uniform_over_the_possible_ones(name):
    task = TASKS[name](out=OUT)
    span = Span.parse(SPANS.get(name, "3-40"), "--length")
    possible = task.possible_lengths(span)
    assert set(possible) == {n for n in range(span.low, span.high + 1) if task.possible(n)}
    lengths = draw(task, 20_000, str(span)).lengths
    assert lengths.max() <= span.high
    if name not in ("set", "stack"):  # which may be shorter
        share = np.array([(lengths == n).mean() for n in possible])
        assert len(set(lengths)) == len(possible)
        assert share == pytest.approx(1 / len(possible), rel=0.25)


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("mod-arith", "5"),
        ("solve-equation", "1-3"),
        ("repetition", "7"),
        ("bucket-sort", "8"),
        ("mqar", "15"),
        ("nearest", "1"),
        ("listops", "1-3"),
        ("digits", "63"),
    ],
)
def test_a_length_that_the_task_cannot_make_is_refused(name, length):
    with pytest.raises(PrepError, match=f"no samples of {length} tokens: the task has"):
        TASKS[name](out=OUT).possible_lengths(Span.parse(length, "--length"))


def slow_expression(length, rng):
    """The grammar as it is written (arXiv 2207.02098)."""
    digit = str(rng.randrange(5))
    if length <= 4:
        return [digit, f"-{digit}", f"({digit})", f"(-{digit})"][length - 1]
    left = rng.randrange(1, length - 3)
    sides = slow_expression(left, rng), slow_expression(length - 3 - left, rng)
    return f"({sides[0]}{rng.choice('+-*')}{sides[1]})"


def depth(text):
    """The number of brackets that are open at the deepest place."""
    level, deepest = 0, 0
    for symbol in text:
        level += {"(": 1, ")": -1}.get(symbol, 0)
        deepest = max(deepest, level)
    return deepest


def test_expressions_are_distributed_as_by_the_grammar():
    rng = random.Random(0)
    slow = [slow_expression(20, rng) for _ in range(4000)]
    codes, _ = expressions(np.random.default_rng(0), np.full(4000, 20), 3)
    fast = ["".join("01234+-*()"[code] for code in row) for row in codes]
    for count in (depth, lambda text: text.count("("), lambda text: text.count("*")):
        mean, spread = (np.mean([count(t) for t in slow]), np.std([count(t) for t in slow]))
        assert np.mean([count(text) for text in fast]) == pytest.approx(mean, abs=0.1 * spread)


def slow_tree(level, max_depth, max_args, rng):
    """The tokens of a node, as the Long Range Arena draws it."""
    if level > 1 and (level >= max_depth or rng.random() > 0.25):
        return [str(rng.randrange(10))]
    arguments = [
        slow_tree(level + 1, max_depth, max_args, rng) for _ in range(rng.randint(2, max_args))
    ]
    return [rng.choice(["[MIN", "[MAX", "[MED", "[SM"]), *itertools.chain(*arguments), "]"]


def test_trees_are_distributed_as_by_the_long_range_arena():
    rng = random.Random(0)
    slow = [slow_tree(1, 4, 5, rng) for _ in range(6000)]
    slow = [tree for tree in slow if 8 <= len(tree) <= 60]
    task = TASKS["listops"](out=OUT, max_depth=4, max_args=5)
    fast = [symbols for symbols, _ in as_symbols(task, draw(task, 6000 // _TREES, "8-60"))]
    assert len(fast) == pytest.approx(len(slow), rel=0.1)
    for count in (len, lambda tree: tree.count("]"), lambda tree: tree.count("[SM")):
        expected, spread = np.mean([count(t) for t in slow]), np.std([count(t) for t in slow])
        assert np.mean([count(tree) for tree in fast]) == pytest.approx(expected, abs=0.1 * spread)


def test_every_image_comes_before_one_comes_again():
    samples = draw(TASKS["digits"](out=OUT), 100, "64")
    counts = [len(set(map(tuple, part.tolist()))) for part in np.split(samples.tokens, [40, 80])]
    assert counts == [40, 40, 20]


def test_gaps_are_distributed_as_by_zoology():
    """numpy's own draws without replacement, of the power law."""
    pairs, space = 3, 13
    task = MultiQueryRecall(out=OUT, pairs=pairs, vocab_size=64, power=0.4)
    weights = np.arange(1, space + 1) ** (0.4 - 1.0)
    slow_rng = np.random.default_rng(0)
    slow = [
        slow_rng.choice(space, pairs, replace=False, p=weights / weights.sum()) for _ in range(6000)
    ]
    samples = draw(task, 6000, str(2 * (space + pairs)))
    fast = [
        [(row.index(key, 2 * pairs) - 2 * pairs) // 2 for key in row[0 : 2 * pairs : 2]]
        for row in samples.tokens.tolist()
    ]
    for number in range(pairs):  # the key number i has the i-th draw
        there, here = (Counter(row[number] for row in rows) for rows in (slow, fast))
        for place in range(space):
            assert here[place] / 6000 == pytest.approx(there[place] / 6000, abs=0.02)


def test_distinct_draws_are_different_and_uniform():
    rows = distinct(np.random.default_rng(0), 30_000, 3, 4)
    counts = Counter(map(tuple, rows.tolist()))
    assert len(counts) == 24
    assert max(counts.values()) / min(counts.values()) < 1.25
