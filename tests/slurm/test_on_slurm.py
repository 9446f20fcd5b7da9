"""Everything that needs the cluster: the policy with a stub as the trainer, and real training.

A life of the stub costs no CPU but seconds of waiting for Slurm, so all scenarios run side by side
in threads, and each test waits for its own.
"""

import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock

import pytest

from tests.slurm import long_runs, nodes, other_jobs, policy, training  # noqa: F401 (their scenarios)
from tests.slurm.conftest import REQUIRED, SUM
from tests.slurm.runs import SCENARIOS, StubRun, TrainerRun, launched

pytestmark = pytest.mark.slurm
LIMIT_S = 360


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
    began = time.monotonic()
    make = Maker(cluster, shards)
    all_layouts = request.config.getoption("--all-layouts")
    possible = {
        name: function
        for name, function in SCENARIOS.items()
        if name in names
        and (cluster.netns or not hasattr(function, "needs_root"))
        and (all_layouts or not hasattr(function, "by_command"))
    }
    # Those with real training take longest, and so begin first.
    first = sorted(possible, key=lambda name: possible[name].__module__ != training.__name__)
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        yield {
            name: partial(possible[name], make)
            if hasattr(possible[name], "alone")
            else pool.submit(possible[name], make).result
            for name in first
        }
    for run in make.made:
        for job in run.files.load().jobs:
            cluster.run("scancel", job, check=False)
    request.config.stash[SUM] = in_sum(make.made, time.monotonic() - began)


def in_sum(runs, seconds):
    """All runs of the scenarios in one line."""
    lives = Counter(type(run) for run in runs for _ in run.lives)
    repeated = sum(run.repeated for run in runs)
    return (
        f"on Slurm: {len(runs)} runs, {lives[StubRun]} lives of the stub and {lives[TrainerRun]} "
        f"of the trainer, {repeated} steps repeated, {seconds:.0f} s of the {LIMIT_S} s that CI has"
    )


@pytest.mark.parametrize("name", sorted(SCENARIOS, key=lambda n: hasattr(SCENARIOS[n], "alone")))
def test_on_slurm(outcomes, name):
    if hasattr(SCENARIOS[name], "by_command") and name not in outcomes:
        pytest.skip("runs by command: --all-layouts")
    if name not in outcomes:
        if os.environ.get(REQUIRED):
            pytest.fail(f"nodes have no network of their own, and {REQUIRED} is set")
        pytest.skip("nodes have no network of their own: this needs root")
    outcomes[name]()
