"""Scenarios of the real trainer: what Slurm does to a run changes none of its numbers."""

import os
import signal
import sys
from pathlib import Path

from tests.slurm.runs import ROOT, by_command, launched, needs_root, said

STEPS = {"run__steps": 60, "checkpoint__interval": 10, "evaluation__interval": 100}


def kill_rank(run, rank):
    """SIGKILL to the trainer of a rank, found by its job and its rank."""
    wanted = {f"RANK={rank}".encode(), f"XLSTM_RUN={run.run}".encode()}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = set(path.read_bytes().split(b"\0"))
        except OSError:
            continue
        if wanted <= variables:
            os.kill(int(path.parent.name), signal.SIGKILL)
            return
    raise AssertionError(f"rank {rank} does not run")


@needs_root
def a_run_lives_through_everything_bit_for_bit(make):
    run = make.trainer("training", site={"partition": "crash"}, **STEPS).submit()
    # 1. A signal while Python imports.
    run.until_ranks_start()
    run.cluster.run("scancel", "--signal=USR1", run.job)
    # 2. A rank is killed.
    run.until_running(life=2, step=13)
    kill_rank(run, 1)
    # 3. A requeue from outside.
    run.until_running(life=3, step=22)
    run.cluster.run("scontrol", "requeue", run.job)
    # 4. A node is lost.
    run.until_running(life=4, step=33)
    run.cluster.crash(run.lives[-1].nodes[1])
    # 5. The end.
    assert run.until_ended() == "COMPLETED", run.log()
    assert len(run.lives) == 5, run.log()
    assert "killed by signal 9" in run.lives[1].reason
    assert [record.code for record in run.files.records(1)] == [75, 75]
    expected = make.undisturbed(run)
    assert run.steps == expected and len(expected) == 60
    lost = [life.last_step - life.checkpoint_step for life in run.lives]
    print(f"steps repeated: {run.repeated}; by life {lost}")
    assert run.repeated <= 30  # at most those since the last checkpoint, in lives 2 and 4
    assert lost[0] == lost[2] == lost[4] == 0
    evaluated_and_converted(run)


@needs_root
def a_run_changes_its_nodes_and_its_launcher_between_lives(make):
    """Two nodes, then two ranks on one, then `srun` by hand: every loss as without Slurm."""
    run = make.trainer("moves", site={"partition": "main"}, **STEPS).submit()
    run.until_running(step=12)
    assert run.command("stop", run.run) == 0 and run.until_ended() == "COMPLETED", run.log()
    run.nodes = 1
    run.submit("--set", "tasks_per_node=2").until_running(life=2, step=30)
    assert run.command("stop", run.run) == 0 and run.until_ended() == "COMPLETED", run.log()
    assert [len(life.nodes) for life in run.lives] == [2, 1] and run.repeated == 0
    words = ["srun", "--partition=main", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-m"]
    done = run.cluster.run(
        *[*words, "pretrain", "train", run.folder / "run.yaml"],
        env={**run.cluster.environment, **run.site["env"]},
        timeout=300,
        cwd=ROOT,
    )
    said = done.stdout + done.stderr
    assert said.count("2 processes on cpu") == 1, said  # and not two runs of one process
    assert run.steps == make.undisturbed(run)


@needs_root
@by_command
def four_ranks_train_the_same_however_nodes_hold_them(make):
    """Four nodes with a rank, two with two, torchrun on two, and `launch`: bit for bit."""
    keys = {**STEPS, "run__steps": 20, "data__micro_batch": 1}
    found = {}
    for nodes, ranks in ((4, 1), (2, 2)):
        site = {"partition": "four", "tasks_per_node": ranks}
        run = make.trainer(f"{nodes} by {ranks}", nodes=nodes, site=site, **keys).submit()
        assert run.until_ended() == "COMPLETED", run.log()
        found[f"{nodes} x {ranks}"] = run.steps
    run = make.trainer("torchrun", site={"partition": "four"}, **keys)
    torchrun(run, nodes=2, ranks_per_node=2)
    found["torchrun"] = run.steps
    expected = launched(run, ranks=4)
    assert len(expected) == 20
    assert all(steps == expected for steps in found.values()), found


def torchrun(run, nodes, ranks_per_node):
    """Train by one torchrun per node, and return what it said."""
    script = f"""
trap '' USR1  # it would die of it, and its workers would train on
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec {sys.executable} -m torch.distributed.run --nnodes {nodes} --nproc-per-node {ranks_per_node} \\
  --node-rank "$SLURM_NODEID" --master-addr "$head" --master-port $((20000 + SLURM_JOB_ID)) \\
  -m pretrain train '{run.folder}/run.yaml' --take-over
"""
    words = ["srun", "--partition=four", f"--nodes={nodes}", "--ntasks-per-node=1"]
    environment = {**run.cluster.environment, **run.site["env"]}
    done = run.cluster.run(
        *words, "/bin/bash", "-c", script, env=environment, timeout=300, cwd=ROOT
    )
    return done.stdout + done.stderr


def evaluated_and_converted(run):
    """Jobs around the run, by the same site file."""
    files = ("--site", run.folder / "site.yaml")
    (job,) = said(run, "submit", "evaluate", run.run, *files).split()
    export = run.folder / "export"
    (other,) = said(run, "submit", "convert", run.run, export, *files).split()
    states = run.cluster.wait_for_end(job, other)
    outputs = [run.files.folder / f"{job}.out", run.folder / f"export.slurm/{other}.out"]
    texts = [path.read_text() for path in outputs]
    assert states == {job: "COMPLETED", other: "COMPLETED"}, texts
    assert "nats per token" in texts[0]
    assert (export / "config.json").exists()
