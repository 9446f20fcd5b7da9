"""Everything that needs the cluster: the policy with a stub as the trainer, and real training.

A life of the stub costs no CPU but seconds of waiting for Slurm, so all scenarios run side by side
in threads, and each test waits for its own.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock

import pytest

from tests.slurm import nodes, other_jobs, policy, training  # noqa: F401 (their scenarios)
from tests.slurm.conftest import REQUIRED
from tests.slurm.runs import SCENARIOS, StubRun, TrainerRun, launched

pytestmark = pytest.mark.slurm


class Maker:
    """Makes runs: `make(name, ...)` with the stub, `make.trainer(name, ...)` with the trainer."""

    def __init__(self, cluster, shards):
        self.cluster, self.shards, self.made = cluster, shards, []
        self._lock, self._undisturbed = Lock(), None

    def undisturbed(self, run):
        """The steps of a run without Slurm and without faults, trained once for all."""
        with self._lock:
            if self._undisturbed is None:
                self._undisturbed = launched(run)
            return self._undisturbed

    def __call__(self, name, **keys):
        self.made.append(StubRun(self.cluster, name, self.shards, **keys))
        return self.made[-1]

    def trainer(self, name, **keys):
        self.made.append(TrainerRun(self.cluster, name, self.shards, **keys))
        return self.made[-1]


@pytest.fixture(scope="module")
def outcomes(cluster, shards, request):
    """The scenarios that were asked for, under way: functions that wait for their ends."""
    names = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == Path(__file__)
    }
    make = Maker(cluster, shards)
    all_layouts = request.config.getoption("--all-layouts")
    possible = {
        name: function
        for name, function in SCENARIOS.items()
        if name in names
        and (cluster.netns or not hasattr(function, "needs_root"))
        and (all_layouts or not hasattr(function, "by_command"))
    }
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        yield {
            name: partial(function, make)
            if hasattr(function, "alone")
            else pool.submit(function, make).result
            for name, function in possible.items()
        }
    for run in make.made:
        for job in run.files.load().jobs:
            cluster.run("scancel", job, check=False)


@pytest.mark.parametrize("name", sorted(SCENARIOS, key=lambda n: hasattr(SCENARIOS[n], "alone")))
def test_on_slurm(outcomes, name):
    if hasattr(SCENARIOS[name], "by_command") and name not in outcomes:
        pytest.skip("runs by command: --all-layouts")
    if name not in outcomes:
        if os.environ.get(REQUIRED):
            pytest.fail(f"nodes have no network of their own, and {REQUIRED} is set")
        pytest.skip("nodes have no network of their own: this needs root")
    outcomes[name]()
