"""Mixtures: exact quotas, phases in closed form, no sample twice and none left out."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import Phase
from pretrain.data.blend import CYCLE, Blend, quotas

THREE = {"a": 0.6, "b": 0.3, "c": 0.1}


def located(blend, first, last):
    source, index = blend.locate(np.arange(first, last))
    return [blend.names[s] for s in source], index


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=12))
def test_quotas_are_the_weights_and_add_up(weights):
    found = quotas(weights)
    assert sum(found) == CYCLE
    for weight, quota in zip(weights, found, strict=True):
        assert abs(quota - weight / sum(weights) * CYCLE) < 1


def test_every_cycle_holds_the_exact_shares():
    blend = Blend("abc", [Phase(0, THREE)], seed=1)
    for first in (0, CYCLE, 10**13 - 10**13 % CYCLE):
        names, _ = located(blend, first, first + CYCLE)
        assert [names.count(name) for name in "abc"] == [6000, 3000, 1000]
    names, _ = located(blend, 0, 1000)
    assert 540 < names.count("a") < 660, "the sources are mixed within a cycle"


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 3 * CYCLE), max_size=3),
    st.lists(
        st.dictionaries(st.sampled_from("abcd"), st.floats(0.05, 1), min_size=1),
        min_size=4,
        max_size=4,
    ),
    st.integers(0, 2**64),
)
def test_samples_of_a_source_follow_one_another_through_all_phases(lengths, mixtures, seed):
    starts = [0, *itertools.accumulate(lengths)]
    blend = Blend("abcd", [Phase(s, m) for s, m in zip(starts, mixtures, strict=False)], seed)
    total = starts[-1] + CYCLE + 77
    source, index = blend.locate(np.arange(total))
    for number in range(4):
        mine = index[source == number]
        assert (mine == np.arange(len(mine))).all(), "in order, none twice, none left out"
    at = np.random.default_rng(0).integers(0, total, 50)
    jumped = blend.locate(at)
    assert (jumped[0] == source[at]).all() and (jumped[1] == index[at]).all()
    for consumed in (0, 1, starts[-1], total):
        counts = np.bincount(source[:consumed], minlength=4).tolist()
        assert list(blend.samples_of_sources(consumed).values()) == counts
    for number, start in enumerate(starts):
        allowed = {"abcd".index(name) for name in mixtures[number]}
        last = ([*starts, total])[number + 1]
        assert set(source[start:last].tolist()) <= allowed


def test_phases_change_the_mixture_where_they_say():
    blend = Blend("abc", [Phase(0, {"a": 1, "b": 1}), Phase(12345, {"c": 3, "b": 1})], seed=0)
    names, _ = located(blend, 0, 12345)
    assert set(names) == {"a", "b"} and abs(names.count("a") - names.count("b")) < 200
    names, indices = located(blend, 12345, 12345 + CYCLE)
    assert (names.count("c"), names.count("b")) == (7500, 2500)
    assert sorted(indices[[n == "c" for n in names]]) == list(range(7500))
    assert blend.shares_at(12344) == {"a": 0.5, "b": 0.5} and blend.shares_at(12345)["c"] == 0.75


def test_one_source_is_read_in_its_own_order():
    blend = Blend("ab", [Phase(0, {"b": 5})], seed=0)
    names, indices = located(blend, 10**13, 10**13 + 50)
    assert set(names) == {"b"} and (indices == np.arange(10**13, 10**13 + 50)).all()


@pytest.mark.parametrize("change", [dict(seed=1), dict(weights=dict(THREE, a=0.5))])
def test_mixtures_depend_on_seed_and_weights(change):
    options = dict(seed=0, weights=THREE)
    whole = [
        located(Blend("abc", [Phase(0, o["weights"])], o["seed"]), 0, 100)[0]
        for o in (options, options | change)
    ]
    assert whole[0] != whole[1]
