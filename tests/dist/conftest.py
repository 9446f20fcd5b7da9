"""Distributed tests: a pool of processes that live as long as the session."""

import pytest

from tests.dist.pool import Pool


@pytest.fixture(scope="session")
def pool():
    """Runs a function on 1 to 4 gloo processes: ``pool(2, function, *args)`` -> results by rank."""
    with Pool(4) as processes:
        yield processes
