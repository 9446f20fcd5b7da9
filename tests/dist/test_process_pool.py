"""The pool's workers live as long as the session, so nothing may pile up in them."""

import os

import pytest

from tests.dist import work


def count_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.dist
def test_engines_of_earlier_calls_are_gone_with_their_groups(pool):
    config = work.run_config("large", layout__tensor=2)
    before = max(pool(2, count_threads))
    for _ in range(2):
        pool(2, work.train, config, 1)
    assert max(pool(2, count_threads)) < before + 20  # one engine's groups have about 50


@pytest.mark.dist
def test_gpus_are_hidden_from_the_ranks(pool):
    assert pool(2, os.getenv, "CUDA_VISIBLE_DEVICES") == ["", ""]
