"""Distributed tests: a pool of processes that live as long as the session."""

import pytest

from tests.data_prep.small_corpus import make_shards
from tests.dist.process_pool import ProcessPool


@pytest.fixture(scope="session")
def pool():
    """Runs a function on 1 to 4 gloo processes: `pool(2, function, *args)` -> results by rank."""
    with ProcessPool(4) as processes:
        yield processes


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder of tiny shards: 16 tokens per row, 330 words."""
    return make_shards(tmp_path_factory.mktemp("shards"))
