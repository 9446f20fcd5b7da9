"""Runs on the cluster, with a stub or with the real trainer, and how scenarios are collected."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Lock

import yaml

from pretrain.watching.metrics import read_metrics
from slurm import cli
from slurm.job.state import RunState
from tests.dist.training_runs import tiny_run

ROOT = Path(__file__).parents[2]
STUB = Path(__file__).with_name("stub_trainer.py")

# One submission at a time: they share one interpreter, and who comes first is to be first.
SUBMITTING = Lock()

#: Functions that each try one way for a life to end, by name; see test_on_slurm.py.
SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def alone(function):
    """A scenario that would disturb all others: it runs after them."""
    function.alone = True
    return scenario(function)


def by_command(function):
    """A scenario that runs with --all-layouts alone: it takes minutes."""
    function.by_command = True
    return scenario(function)


def needs_root(function):
    """A scenario whose nodes crash, lose their network or have to find each other."""
    function.needs_root = True
    return scenario(function)


class SlurmRun:
    """A run on the cluster, in a folder of its own whose name has a space.

    Args:
        cluster: where it runs.
        name: of its folder.
        nodes: of its job.
        site: keys of its site file.
        config: keys of its run file by section, without `run.dir`.
        train: what stands in for `python -m pretrain`, as a line of bash; the real one if None.

    Attributes:
        files: its state.
        job: the job of its first submission.
    """

    def __init__(self, cluster, name, *, nodes, site, config, train=None):
        self.cluster, self.nodes, self.job = cluster, nodes, None
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name} ", dir=cluster.root))
        self.run = self.folder / "run"
        self.run.mkdir()
        self.files = RunState(self.run)
        self.site = {"partition": "main", "time": "1:00:00", "exclusive": False, **(site or {})}
        if train is not None:
            # Everything but the training itself is real; decisions need no installed package.
            python = self.folder / "python"
            python.write_text(
                f'#!/bin/bash\ncase "$*" in "-m pretrain "*) {train};;\n"-m pip"*) ;;\n'
                f'"-m "*) exec {sys.executable} "$@";; *) exec {sys.executable} -S "$@";; esac\n'
            )
            python.chmod(0o755)
            self.site["python"] = str(python)
        (self.folder / "site.yaml").write_text(yaml.safe_dump(self.site))
        config = {**config, "run": {**config["run"], "dir": str(self.run)}}
        (self.folder / "run.yaml").write_text(yaml.safe_dump(config))

    def command(self, *words):
        """Run `python -m slurm`."""
        return cli.run([str(word) for word in words])

    def submit(self, *more):
        words = ["submit", "train", self.folder / "run.yaml", "--nodes", self.nodes]
        with SUBMITTING:
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

    def until_ranks_start(self, life=1, seconds=300):
        """Wait until all ranks of a life are there, whatever they do."""
        ranks = self.nodes * self.site.get("tasks_per_node", 1)
        self.wait(lambda run: len(run.files.records(life)) == ranks, seconds, "no rank starts")

    def until_running(self, life=1, step=1, seconds=300):
        """Wait until a life trains, and has reached a step."""

        def running(run):
            done = run.files.progress()
            return done.get("life", 0) >= life and done["step"] >= step

        self.wait(running, seconds, f"life {life} does not reach step {step}")
        return self

    def until_ended(self, seconds=400):
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


class StubRun(SlurmRun):
    """A run whose trainer is tests/slurm/stub_trainer.py."""

    def __init__(self, cluster, name, shards, *, nodes=2, site=None, **stub):
        config = {
            "run": {"steps": stub.get("steps", 40)},
            "model": {"pattern": "MM", "hidden_size": 64, "num_heads": 2, "vocab_size": 384},
            "data": {"path": str(shards), "seq_len": 16, "global_batch": 8, "micro_batch": 1},
        }
        train = f'exec {sys.executable} -S {STUB} "$@"'
        super().__init__(cluster, name, nodes=nodes, site=site, config=config, train=train)
        (self.run / "stub.json").write_text(json.dumps(stub))


class TrainerRun(SlurmRun):
    """A run of the real trainer on the tiny shards, slowed down so that faults can meet it."""

    def __init__(self, cluster, name, shards, *, nodes=2, site=None, **changes):
        config = tiny_run(Path("unused"), shards, **changes)
        paths = f"{ROOT}:{ROOT / 'kernels'}"
        environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        train = f'exec {sys.executable} -m tests.slurm.slow_trainer "${{@:3}}"'
        site = {"env": environment, **(site or {})}
        super().__init__(cluster, name, nodes=nodes, site=site, config=config, train=train)

    @property
    def steps(self):
        """Loss and gradient norm of every step."""
        return steps_of(self.run)


def steps_of(run):
    """Loss and gradient norm of every step that a run has logged."""
    log = read_metrics(run / "metrics.jsonl")
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in log if "loss" in line}


def launched(run, ranks=2):
    """The losses of the same run by `launch` on this machine."""
    folder = run.folder / "launched"
    words = [sys.executable, "-m", "pretrain", "launch", run.folder / "run.yaml"]
    done = subprocess.run(
        [*map(str, words), "--nproc", str(ranks), "--run.dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **run.site["env"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return steps_of(folder)


def said(run, *words, code=0):
    """What `python -m slurm` prints, in a process of its own: the others print meanwhile."""
    command = [sys.executable, "-m", "slurm", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def site(run):
    return ("--site", run.folder / "site.yaml")


def by_hand(run):
    """Submit the run's file without asking `python -m slurm`."""
    return run.cluster.run("sbatch", "--parsable", run.files.folder / "train.sbatch").stdout.strip()
