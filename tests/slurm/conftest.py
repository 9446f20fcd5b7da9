"""The cluster of the session, and runs on it whose trainer is a stub."""

import os
import shutil
import tempfile

import pytest

from tests.data_prep.small_corpus import make_shards
from tests.slurm.cluster import Cluster, missing_programs

REQUIRED = "XLSTM_REQUIRE_SLURM"
SUM = pytest.StashKey[str]()


def pytest_terminal_summary(terminalreporter, config):
    """What the scenarios on the cluster took."""
    if SUM in config.stash:
        terminalreporter.write_line(config.stash[SUM])


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder of tiny shards: 16 tokens per row, 330 words."""
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")  # later tests of the session must not find a Slurm to ask
def cluster():
    missing = missing_programs()
    if missing:
        reason = f"no Slurm here ({', '.join(missing)} missing): only rendering is tested"
        if os.environ.get(REQUIRED):
            pytest.fail(f"{reason}, and {REQUIRED} is set")
        pytest.skip(reason)
    # Not in /tmp, which the product takes for a disk of each node's own.
    folder = tempfile.mkdtemp(prefix="xlstm-cluster-", dir="/var/tmp")
    os.chmod(folder, 0o755)
    cluster = Cluster(folder)
    before = dict(os.environ)
    try:
        cluster.up()
        os.environ.update(cluster.environment)
        yield cluster
    finally:
        os.environ.clear()
        os.environ.update(before)
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)
