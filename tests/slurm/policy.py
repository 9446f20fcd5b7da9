"""Scenarios of the policy: every way for a life of the stub to end."""

import json
import re
import shutil
import signal
import sys
import time

import yaml

from tests.slurm.runs import ROOT, alone, by_hand, needs_root, said, scenario, site

AT_ONCE = {"restarts": {"wait_minutes": [0]}}  # no waits after lives without progress


@scenario
def a_dry_run_says_what_the_cluster_is_like(make):
    run = make("dry")
    words = ("--nodes", 1, *site(run), "--dry-run", "--set", "partition=low")
    text = said(run, "submit", "train", run.folder / "run.yaml", *words)
    assert "#SBATCH --partition=low" in text and "xlstm_life requeue" in text
    for fact in ("KillWait=5 sec", "GraceTime=10", "JobRequeue=1", "SlurmdTimeout=10 sec"):
        assert fact in text
    assert run.files.load().job == ""  # nothing was submitted


@scenario
def what_slurm_refuses_is_said_in_its_words(make):
    run = make("refused")
    words = ("submit", "train", run.folder / "run.yaml", *site(run), "--nodes", 2)
    assert "invalid partition" in said(run, *words, "--set", "partition=nowhere", code=2)
    assert "partition low has 1 nodes" in said(run, *words, "--set", "partition=low", code=2)
    assert "no node of partition main has more" in said(
        run, *words, "--set", "gpus_per_node=4", "--set", "tasks_per_node=1", code=2
    )
    assert run.files.load().job == ""


# Lives that end well ----------------------------------------------------------------------------


@scenario
def a_run_is_done(make):
    run = make("done").submit()
    assert run.until_ended() == "COMPLETED"
    assert run.causes == ["done"], run.log()
    again = run.command("submit", "train", run.folder / "run.yaml", "--nodes", 2, *site(run))
    assert again == 2  # all steps are done


@scenario
def a_time_limit_is_met_with_a_checkpoint(make):
    site = {"time": "00:01:00", "signal": {"seconds": 40}}
    # 70 s of steps: Slurm sends the signal up to 30 s late, and none to a life that ends before.
    run = make("limit", site=site, steps=700).submit()
    run.wait(lambda run: run.lives and run.lives[-1].action == "done", 300, "not done")
    assert {*run.causes[:-1]} == {"interrupted"} and run.repeated == 0


@scenario
def a_signal_during_the_imports_is_heard(make):
    run = make("imports", import_s=3).submit()
    run.wait(lambda run: len(run.files.records(1)) == 2, 120, "no rank starts")
    run.cluster.run("scancel", "--signal=USR1", run.job)
    assert run.until_ended() == "COMPLETED"
    assert [record.code for record in run.files.records(1)] == [75, 75]
    assert run.lives[0].checkpoint_step == 1
    assert run.causes == ["interrupted", "done"] and run.repeated == 0


@scenario
def a_requeue_from_outside_loses_nothing(make):
    run = make("requeue", steps=60).submit().until_running(step=5)
    run.cluster.run("scontrol", "requeue", run.job)
    assert run.until_ended() == "COMPLETED"
    assert run.causes == ["interrupted", "done"] and run.repeated == 0
    assert run.files.load().job == run.job  # the same job


def preempted(make, partition):
    run = make(partition, nodes=1, steps=60, site={"partition": partition, "exclusive": True})
    run.submit().until_running(step=5)
    run.cluster.run("sbatch", "-p", "high", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    assert run.until_ended() == "COMPLETED"
    assert run.causes == ["interrupted", "done"] and run.repeated == 0, run.log()
    return run


@scenario
def a_preemption_with_grace_and_one_without_lose_nothing(make):
    preempted(make, "low")  # one after the other: they share a node
    preempted(make, "harsh")


@scenario
def a_stop_saves_and_a_resume_goes_on(make):
    run = make("stop", steps=60).submit().until_running(step=5)
    assert run.command("stop", run.run) == 0
    assert run.until_ended() == "COMPLETED"
    (life,) = run.lives
    assert (life.action, life.cause) == ("stop", "interrupted") and life.progressed
    assert run.command("stop", run.run) == 2  # nothing to stop
    assert run.command("resume", run.run) == 0
    assert run.files.load().job != run.job
    assert run.until_ended() == "COMPLETED"
    assert run.causes == ["interrupted", "done"] and run.repeated == 0


@scenario
def a_cancelled_job_stays_cancelled(make):
    run = make("scancel", steps=3000).submit().until_running(step=5)
    run.cluster.run("scontrol", "requeue", run.job)  # leaves its reason in the same output
    run.until_running(life=2, step=15)
    run.cluster.run("scancel", run.job)
    assert run.until_ended() == "CANCELLED"
    time.sleep(3)
    assert run.files.load().job == run.job and "cancelled; python -m slurm resume" in run.log()


# Restarts that are not wanted -------------------------------------------------------------------


@scenario
def bad_input_is_never_repeated(make):
    message = "error: data.path='x' is not a folder"
    run = make("bad", faults=[{"rank": 1, "code": 2, "say": message}]).submit()
    assert run.until_ended() == "FAILED"
    assert run.cluster.job(run.job)["ExitCode"] == "2:0"
    (life,) = run.lives
    assert (life.cause, life.action, life.last_line) == ("bad input", "fail", message)
    assert message in run.files.load().verdict


@scenario
def a_diverged_run_is_never_repeated(make):
    run = make("diverged", faults=[{"rank": 0, "code": 71, "say": "error: loss nan"}]).submit()
    assert run.until_ended() == "FAILED"
    assert run.cluster.job(run.job)["ExitCode"] == "71:0" and run.causes == ["diverged"]


@scenario
def a_superseded_life_ends_quietly(make):
    run = make("superseded", faults=[{"code": 76, "say": "superseded: life 7"}]).submit()
    assert run.until_ended() == "COMPLETED"
    assert [life.action for life in run.lives] == ["leave"]


@scenario
def the_same_error_twice_without_a_checkpoint_ends_the_run(make):
    run = make("error", saves=False, faults=[{"rank": 0, "step": 3, "code": 1}], site=AT_ONCE)
    assert run.submit().until_ended() == "FAILED"
    assert run.causes == ["error", "error"]
    assert "the same error twice" in run.files.load().verdict


@scenario
def lives_without_progress_reach_the_cap(make):
    fault = {"rank": 0, "step": 3, "code": -signal.SIGKILL, "say": ""}
    run = make("cap", saves=False, faults=[fault], site=AT_ONCE).submit()
    assert run.until_ended() == "FAILED"
    assert run.causes == ["interrupted"] * 3
    assert "3 lives in a row left no newer checkpoint" in run.files.load().verdict
    # A job that is submitted by hand nevertheless says so and does nothing.
    job = by_hand(run)
    assert run.cluster.wait_for_end(job) == {job: "COMPLETED"}
    assert "left no newer checkpoint" in run.log() and len(run.lives) == 3


@scenario
def progress_sets_the_cap_back(make):
    faults = [
        {"life": life, "rank": 0, "step": step, "code": 1, "say": f"ValueError: {life}"}
        for life, step in ((1, 3), (2, 3), (3, 15), (4, 13), (5, 13))
    ]
    run = make("reset", saves=True, faults=faults, nodes=1, site=AT_ONCE).submit()
    assert run.until_ended() == "COMPLETED"
    assert run.causes == ["error"] * 5 + ["done"]
    assert [life.checkpoint_step for life in run.lives] == [0, 0, 10, 10, 10, 40]


@scenario
def a_life_without_progress_makes_the_next_one_wait(make):
    fault = {"rank": 0, "step": 3, "code": 74, "say": "hang"}
    run = make("wait", saves=False, faults=[fault], site={"restarts": {"wait_minutes": [9]}})
    run.submit().wait(lambda run: run.state == "PENDING" and run.causes, 120, "no requeue")
    run.wait(lambda run: "eld" not in run.cluster.job(run.job)["Reason"], 60, "left held")
    start = run.cluster.job(run.job)["StartTime"]
    assert time.mktime(time.strptime(start, "%Y-%m-%dT%H:%M:%S")) - time.time() > 400


# Restarts that are wanted -----------------------------------------------------------------------


@scenario
def a_hang_starts_the_run_again(make):
    run = make("hang", faults=[{"life": 1, "rank": 1, "step": 12, "code": 74}]).submit()
    assert run.until_ended() == "COMPLETED"
    assert run.causes == ["hang", "done"]


@scenario
def a_port_in_use_costs_no_life(make):
    fault = {"rank": 0, "code": 1, "say": "RuntimeError: EADDRINUSE", "once": True}
    run = make("port", faults=[fault]).submit()
    assert run.until_ended() == "COMPLETED"
    assert run.causes == ["done"]
    folder = run.files.life_folder(1)
    ports = [
        re.search(r"port (\d+)", path.read_text())[1]
        for path in (folder / "try-1/rank-00000.log", folder / "rank-00000.log")
    ]
    assert ports[0] != ports[1]


@scenario
def a_bad_node_is_left_out(make):
    say = "RuntimeError: CUDA error: uncorrectable ECC error encountered"
    fault = {"node": "n1", "step": 11, "code": 1, "say": say, "once": True}
    later = {"node": "n1", "step": 15, "code": 1, "say": say}
    run = make("bad node", nodes=2, faults=[fault, later], site=AT_ONCE).submit()
    run.wait(lambda run: run.state == "PENDING" and len(run.lives) == 2, 120, "not left out")
    run.wait(lambda run: "eld" not in run.cluster.job(run.job)["Reason"], 60, "left held")
    assert run.cluster.job(run.job)["ExcNodeList"] == "n1"  # the job now waits for another node
    run.cluster.run("scontrol", "update", f"JobId={run.job}", "Partition=three")
    assert run.until_ended() == "COMPLETED"
    assert [life.nodes for life in run.lives] == [("n1", "n2"), ("n1", "n2"), ("n2", "n6")]
    assert run.files.load().excluded == {"n1": "to blame for 2 of 5 lives"}
    story = said(run, "status", run.run)
    assert "the run is finished" in story and "left out: n1 (to blame for 2 of 5 lives)" in story
    assert story.count("CUDA error: uncorrectable ECC") == 2
    facts = json.loads(said(run, "status", run.run, "--json"))
    assert [life["cause"] for life in facts["lives"]] == ["device error"] * 2 + ["done"]
    assert facts["repeated_steps"] == run.repeated > 0 and 0 < facts["goodput"] <= 1


@scenario
def a_held_job_is_released(make):
    run = make("held", steps=60).submit().until_running(step=5)
    run.cluster.run("scontrol", "requeuehold", run.job)
    run.wait(lambda run: "held" in run.cluster.job(run.job).get("Reason", ""), 60, "not held")
    assert "was left held" in said(run, "status", run.run)
    assert run.command("resume", run.run) == 0
    assert run.until_ended() == "COMPLETED"
    assert run.causes == ["interrupted", "done"] and run.files.load().job == run.job


@scenario
def a_chain_goes_on_in_its_next_job_and_cancels_the_last(make):
    run = make("chain", site={"requeue": "chain"}, steps=60).submit().until_running(step=5)
    run.wait(lambda run: run.files.load().job != run.job, 60, "no successor")
    successor = run.files.load().job
    run.cluster.run("scancel", "--signal=USR1", run.job)
    assert run.cluster.wait_for_end(run.job) == {run.job: "FAILED"}  # with 75
    assert run.cluster.wait_for_end(successor) == {successor: "COMPLETED"}
    assert [life.job for life in run.lives] == [run.job, successor]
    assert run.causes == ["interrupted", "done"] and run.repeated == 0
    assert run.files.load().job not in (run.job, successor)
    assert run.until_ended() == "CANCELLED"  # the successor that nobody needs


@scenario
def a_site_that_forbids_requeue_gets_a_new_job(make):
    run = make("forbidden", steps=60).submit().until_running(step=5)
    run.cluster.run("scontrol", "update", f"JobId={run.job}", "Requeue=0")
    run.cluster.run("scancel", "--signal=USR1", run.job)
    run.wait(lambda run: len(run.lives) == 2, 120, "no second life")
    assert run.files.load().job != run.job
    assert run.until_ended() == "COMPLETED"
    assert run.causes == ["interrupted", "done"] and run.repeated == 0


@scenario
def a_run_that_may_not_restart_waits_for_a_person(make):
    run = make("never", site={"requeue": "never"}, steps=60).submit().until_running(step=5)
    run.cluster.run("scancel", "--signal=USR1", run.job)
    assert run.until_ended() == "FAILED"
    assert run.cluster.job(run.job)["ExitCode"] == "75:0"
    assert run.command("resume", run.run) == 0
    assert run.until_ended() == "COMPLETED"
    assert run.causes == ["interrupted", "done"]


@scenario
def two_jobs_never_work_on_one_run(make):
    run = make("two", steps=3000).submit().until_running(step=5)
    again = run.command("submit", "train", run.folder / "run.yaml", "--nodes", 2, *site(run))
    assert again == 2
    job = by_hand(run)
    assert run.cluster.wait_for_end(job) == {job: "COMPLETED"}
    assert f"job {run.job} is at work on this run" in run.log()
    assert run.command("stop", run.run, "--now") == 0
    assert run.until_ended() == "CANCELLED"
    assert len(run.lives) == 1


# Faults of nodes --------------------------------------------------------------------------------


@needs_root
def a_cut_off_node_that_comes_back_does_not_end_the_new_life(make):
    run = make("cut", site={"partition": "cut"}, nodes=1, steps=3000).submit()
    run.until_running(step=15)
    (node,) = run.lives[0].nodes
    run.cluster.cut(node)
    run.until_running(life=2, step=20, seconds=150)
    run.cluster.heal(node)  # its old srun tells Slurm to end the step of that number
    seen = run.files.progress()["step"]
    run.until_running(life=2, step=seen + 150, seconds=120)
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
    run.submit()
    assert run.cluster.wait_for_end(job, seconds=300) == {job: "FAILED"}
    text = (run.files.folder / f"preflight/{job}.out").read_text()
    assert "n1: command: [ $SLURMD_NODENAME != n1 ] ended with 1" in text and "n2: fit" in text
    assert run.cluster.job(job)["ExitCode"] == "70:0"
    assert run.until_ended(400) == "COMPLETED"
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


# Jobs around a run ------------------------------------------------------------------------------


@scenario
def an_array_prepares_what_one_process_does(make):
    """One element is stopped and goes on, another is killed, which a second submission repairs."""
    run = make("prep", nodes=2)
    python = run.folder / "python"
    python.write_text(
        f"""#!/bin/bash
case "$*" in
*"--task 0") mkdir "{run.folder}/stopped" && exit 75;;
*"--task 1") mkdir "{run.folder}/killed" && kill -KILL $$;;
esac
exec {sys.executable} "$@"
"""
    )
    paths = f"{ROOT}:{ROOT / 'kernels'}"
    site_file = {**run.site, "env": {"PYTHONPATH": paths}}
    (run.folder / "site.yaml").write_text(yaml.safe_dump(site_file))
    values = {
        "input": [str(make.shards.parent / "corpus.jsonl")],
        "tokenizer": str(make.shards.parent / "tok"),
        "out": str(run.folder / "shards"),
        "seq_len": 16,
        "valid_fraction": 0.2,
        "shard_mb": 0.004,
        "workers": 1,
    }
    (run.folder / "build.yaml").write_text(yaml.safe_dump(values))
    words = ("submit", "prep", run.folder / "build.yaml", "--nodes", 2, *site(run))
    array, merge = said(run, *words).split()
    # The merge never can start, and does not wait for ever.
    assert run.cluster.wait_for_end(merge, seconds=200) == {merge: "CANCELLED"}
    run.cluster.wait_for(lambda: ended(run, array), 200, "the array does not end")
    stopped, killed = (run.cluster.job(f"{array}_{number}") for number in (0, 1))
    assert (stopped["JobState"], stopped["Restarts"]) == ("COMPLETED", "1")
    assert (killed["JobState"], killed["Restarts"]) == ("FAILED", "0")
    array, merge = said(run, *words).split()
    assert run.cluster.wait_for_end(merge, seconds=200) == {merge: "COMPLETED"}
    for path in sorted(make.shards.glob("*/*/*.tar")):
        assert (run.folder / "shards" / path.relative_to(make.shards)).read_bytes() == (
            path.read_bytes()
        )


@scenario
def every_checkpoint_is_evaluated_as_it_comes(make):
    run = make("each", steps=150)
    words = ("submit", "evaluate", run.run, "--every-checkpoint", 0.05, *site(run))
    job = said(run, *words).strip()  # there is none yet
    assert run.submit().until_ended() == "COMPLETED"
    assert run.cluster.wait_for_end(job) == {job: "COMPLETED"}
    results = sorted((run.run / "evaluations").iterdir())
    assert [path.stem for path in results] == sorted(
        path.name for path in (run.run / "checkpoints").iterdir()
    )
    assert len(results) == 15 and json.loads(results[0].read_text())["loss"] == 1.5
    assert int(run.cluster.job(job)["Restarts"]) > 0  # it waited in the queue


def ended(run, job):
    """Whether nothing of an array is in the queue."""
    return not run.cluster.run("squeue", "-h", "-j", job, check=False).stdout.strip()


@alone
@needs_root
def a_dead_slurmd_and_a_dead_controller_cost_nothing(make):
    """Steps live on without them; the daemons come back and find them."""
    run = make("daemons", site={"partition": "cut"}, nodes=1, steps=200).submit()
    run.until_running(step=5)
    run.cluster.kill_slurmd(run.lives[0].nodes[0])
    run.until_running(step=30)
    run.cluster.restart_slurmd(run.lives[0].nodes[0])
    run.cluster.kill_controller()
    run.until_running(step=60)
    run.cluster.start_controller()
    assert run.until_ended() == "COMPLETED"
    assert run.causes == ["done"], run.log()
