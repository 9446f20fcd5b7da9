"""The cluster of the session, and runs on it whose trainer is a stub."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from slurm import cli
from slurm.state import RunState
from tests.slurm.cluster import Cluster, missing_programs

ROOT = Path(__file__).parents[2]
STUB = Path(__file__).with_name("stub_trainer.py")
REQUIRED = "XLSTM_REQUIRE_SLURM"


@pytest.fixture(scope="session")
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


class StubRun:
    """A run whose trainer is tests/slurm/stub_trainer.py, on the cluster.

    Attributes:
        files: its state.
        job: the job of its first submission.
    """

    def __init__(self, cluster, name, *, nodes=2, site=None, **stub):
        self.cluster, self.nodes = cluster, nodes
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name} ", dir=cluster.root))
        self.run = self.folder / "run"
        self.run.mkdir()
        self.files = RunState(self.run)
        self.site = {"partition": "main", "time": "1:00:00", "exclusive": False, **(site or {})}
        python = self.folder / "python"
        python.write_text(
            f'#!/bin/bash\ncase "$*" in "-m pretrain train"*) exec {sys.executable} -S {STUB};;\n'
            f'"-m pip"*) ;;\n*) exec {sys.executable} -S "$@";; esac\n'
        )
        python.chmod(0o755)
        self.site.setdefault("python", str(python))
        (self.folder / "data").mkdir()
        self.stub(**stub)
        (self.folder / "site.yaml").write_text(yaml.safe_dump(self.site))
        model = {"pattern": "MM", "hidden_size": 64, "num_heads": 2, "vocab_size": 64}
        data = {"path": str(self.folder / "data"), "seq_len": 8, "global_batch": 8}
        config = {
            "run": {"dir": str(self.run), "steps": stub.get("steps", 40)},
            "model": model,
            "data": {**data, "micro_batch": 1},
        }
        (self.folder / "run.yaml").write_text(yaml.safe_dump(config))
        self.job = None

    def stub(self, **plan):
        (self.run / "stub.json").write_text(json.dumps(plan))

    def command(self, *words):
        """Run `python -m slurm`."""
        return cli.run([str(word) for word in words])

    def submit(self, *more):
        words = ["submit", "train", self.folder / "run.yaml", "--nodes", self.nodes]
        assert self.command(*words, "--site", self.folder / "site.yaml", *more) == 0
        self.job = self.files.load().job
        return self

    @property
    def lives(self):
        return self.files.load().lives

    @property
    def state(self):
        """Slurm's state of the job that has the run."""
        return self.cluster.job(self.files.load().job).get("JobState")

    def wait(self, condition, seconds, what):
        try:
            return self.cluster.wait_for(lambda: condition(self), seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{self.log()}\n{error}") from None

    def until_running(self, life=1, step=1, seconds=120):
        """Wait until a life trains, and has reached a step."""

        def running(run):
            done = run.files.progress()
            return done.get("life", 0) >= life and done["step"] >= step

        self.wait(running, seconds, f"life {life} does not reach step {step}")
        return self

    def until_ended(self, seconds=150):
        """Wait until nothing of the run is queued or runs any more; Slurm's last state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(lambda run: run.state in ended, seconds, "the job does not end")
        return self.state

    def log(self):
        """Everything the jobs of the run have said."""
        texts = [path.read_text() for path in sorted(self.files.folder.glob("*.out"))]
        return "\n".join([*texts, (self.files.folder / "story.jsonl").read_text()])

    @property
    def causes(self):
        return [life.cause for life in self.lives]

    @property
    def repeated(self):
        """Steps that were done again, in all lives."""
        pairs = zip(self.lives, self.lives[1:], strict=False)
        return sum(before.last_step - after.start_step for before, after in pairs)
