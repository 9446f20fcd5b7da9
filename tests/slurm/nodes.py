"""Scenarios of nodes: one that is cut off, one that is not fit, its own disk, its daemons."""

import json
import shutil
import time

from tests.slurm.policy import AT_ONCE
from tests.slurm.runs import ROOT, alone, needs_root, said, scenario, site


@needs_root
def a_cut_off_node_that_comes_back_does_not_end_the_new_life(make):
    run = make("cut", site={"partition": "cut"}, nodes=1, steps=3000).submit()
    run.until_running(step=15)
    (node,) = run.lives[0].nodes
    run.cluster.cut(node)
    run.until_running(life=2, step=20)
    run.cluster.heal(node)  # its old srun tells Slurm to end the step of that number
    seen = run.files.progress()["step"]
    run.until_running(life=2, step=seen + 150)
    assert len(run.lives) == 2 and run.lives[1].nodes != (node,), run.log()
    assert run.lives[1].ended is None  # the old batch script has left the state alone
    assert min(record.step_id for record in run.files.records(2)) >= 1


@scenario
def a_node_that_fails_its_preflight_is_left_out(make):
    """The site's command fails on one node; the preflight itself is the real one."""
    health = {"preflight": True, "command": "[ $SLURMD_NODENAME != n1 ]"}
    free = {"min_free_gb": {"run": 0, "scratch": 0}}
    paths = {"env": {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}}
    keys = {**AT_ONCE, **paths, "partition": "three", "health": {**health, **free}}
    run = make("preflight", nodes=2, site=keys)
    words = ("submit", "preflight", run.folder / "run.yaml", "--nodes", 2, *site(run))
    job = said(run, *words).strip()  # checks, and trains nothing
    assert run.cluster.wait_for_end(job, seconds=300) == {job: "FAILED"}
    state = ("sinfo", "-h", "-n", "n1", "-p", "three", "-o", "%T")
    # While n1 is still ending that job, the run would get the other two. Jobs of other scenarios
    # may run there: nodes are shared.
    slurm = run.cluster
    free = ("idle", "mixed")
    slurm.wait_for(lambda: slurm.run(*state).stdout.strip() in free, 120, "n1 does not end its job")
    run.submit()
    text = (run.files.folder / f"preflight/{job}.out").read_text()
    assert "n1: command: [ $SLURMD_NODENAME != n1 ] ended with 1" in text and "n2: fit" in text
    assert run.cluster.job(job)["ExitCode"] == "70:0"
    assert run.until_ended() == "COMPLETED"
    assert run.causes == ["preflight", "done"], run.log()
    assert [life.nodes for life in run.lives] == [("n1", "n2"), ("n2", "n6")]
    (reason,) = run.files.load().excluded.values()
    assert reason.startswith("command: [ $SLURMD_NODENAME != n1 ] ended with 1")
    found = json.loads((run.files.life_folder(2) / "preflight.json").read_text())
    assert (found["bad_nodes"], found["failed"]) == ({}, "")
    facts = [report["facts"] for report in found["reports"]]
    assert len(facts) == 2 and all(each["links"][0]["gbs"] > 0 for each in facts)


@scenario
def shards_are_copied_to_each_nodes_own_disk(make):
    scratch = make.cluster.root / "scratch"
    run = make("stage", steps=5, site={"scratch": str(scratch), "stage": {"data": True}})
    shards = run.folder / "my shards"
    shutil.copytree(make.shards, shards)
    run.submit("--data.path", shards)
    assert run.until_ended() == "COMPLETED", run.log()
    for rank in (0, 1):
        log = (run.files.life_folder(1) / f"rank-{rank:05d}.log").read_text()
        assert f"reads {scratch}/xlstm-{run.job}/shards-0: " in log and "manifest.json" in log
    left = make.cluster.root / "local" if make.cluster.netns else make.cluster.root
    assert not list(left.glob(f"**/xlstm-{run.job}"))
    # A folder that cannot be copied is read where it is.
    run = make("unstaged", steps=5, site={"scratch": "/proc/none", "stage": {"data": True}})
    run.submit("--data.path", shards)
    assert run.until_ended() == "COMPLETED", run.log()
    assert "the ranks read what all nodes see" in run.log()


def _until_saved(cluster, job):
    """Wait until the controller's files know a running job.

    It writes what changes some seconds later. One that dies before has lost the job.
    """
    changed = time.time()
    cluster.run("scontrol", "update", f"JobId={job}", "Comment=to be saved")
    file = cluster.root / "state/job_state"
    cluster.wait_for(lambda: file.stat().st_mtime > changed, 60, f"job {job} is not saved")


@alone
@needs_root
def a_dead_slurmd_and_a_dead_controller_cost_nothing(make):
    """Steps live on without them; the daemons come back and find them."""
    run = make("daemons", site={"partition": "cut"}, nodes=1, steps=250).submit()
    run.until_running(step=5)
    _until_saved(run.cluster, run.job)
    run.cluster.kill_slurmd(run.lives[0].nodes[0])
    run.until_running(step=run.files.progress()["step"] + 25)
    run.cluster.restart_slurmd(run.lives[0].nodes[0])
    run.cluster.kill_controller()
    run.until_running(step=run.files.progress()["step"] + 30)
    run.cluster.start_controller()
    assert run.until_ended() == "COMPLETED"
    assert run.causes == ["done"], run.log()
