"""Scenarios of the policy: every way for a life of the stub to end."""

import json
import re
import signal
import time

from tests.slurm.runs import by_hand, said, scenario, site

AT_ONCE = {"restarts": {"wait_minutes": [0]}}  # no waits after lives without progress


@scenario
def a_dry_run_says_what_the_cluster_is_like(make):
    run = make("dry")
    words = ("--nodes", 1, *site(run), "--dry-run", "--set", "partition=low")
    text = said(run, "submit", "train", run.folder / "run.yaml", *words)
    assert "#SBATCH --partition=low" in text and "\nxlstm_life\n" in text
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
    run = make("limit", site=site, hold_lives=1).submit()
    assert run.until_ended() == "COMPLETED"
    # The signal comes up to 60 s early, and so may meet the second life too.
    assert {*run.causes[:-1]} == {"interrupted"} and run.causes[-1] == "done", run.log()
    assert run.repeated == 0


@scenario
def a_signal_during_the_imports_is_heard(make):
    run = make("imports", import_life=1).submit()
    run.until_ranks_start()
    run.cluster.run("scancel", "--signal=USR1", run.job)
    assert run.until_ended() == "COMPLETED"
    assert [record.code for record in run.files.records(1)] == [75, 75]
    assert run.lives[0].checkpoint_step == 1
    assert run.causes == ["interrupted", "done"] and run.repeated == 0


@scenario
def a_requeue_from_outside_loses_nothing(make):
    run = make("requeue", hold_lives=1).submit().until_running(step=5)
    run.cluster.run("scontrol", "requeue", run.job)
    assert run.until_ended() == "COMPLETED"
    assert run.causes == ["interrupted", "done"] and run.repeated == 0
    assert run.files.load().job == run.job  # the same job


def preempted(make, partition):
    run = make(partition, nodes=1, hold_lives=1, site={"partition": partition, "exclusive": True})
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
    run = make("stop", hold_lives=1).submit().until_running(step=5)
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
    said = "cancelled; python -m slurm resume"  # the last that its batch script does
    run.wait(lambda run: said in run.log(), 60, "the batch script does not end")
    assert run.files.load().job == run.job


@scenario
def a_batch_script_that_is_killed_is_told_without_accounting(make):
    """Nobody decides, nobody writes the end down, and sacct knows nothing."""
    run = make("unseen", steps=3000).submit().until_running(step=15)
    run.cluster.run("scancel", "--batch", "--signal=KILL", run.job)
    assert run.until_ended() == "FAILED"
    run.wait(lambda run: "nobody saw it end" in said(run, "status", run.run), 60, "in the queue")
    assert "Slurm has no record of it" in said(run, "status", run.run)
    (life,) = json.loads(said(run, "status", run.run, "--json"))["lives"]
    assert life["to_step"] >= 15 and life["seconds"] < 60
    assert run.command("resume", run.run) == 0
    run.until_running(life=2, step=15)
    assert run.command("stop", run.run) == 0 and run.until_ended() == "COMPLETED"
    assert run.causes == ["interrupted", "interrupted"]


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
    run = make("held", hold_lives=1).submit().until_running(step=5)
    run.cluster.run("scontrol", "requeuehold", run.job)
    run.wait(lambda run: "held" in run.cluster.job(run.job).get("Reason", ""), 60, "not held")
    assert "was left held" in said(run, "status", run.run)
    assert run.command("resume", run.run) == 0
    assert run.until_ended() == "COMPLETED"
    assert run.causes == ["interrupted", "done"] and run.files.load().job == run.job


@scenario
def a_chain_goes_on_in_its_next_job_and_cancels_the_last(make):
    run = make("chain", site={"requeue": "chain"}, hold_lives=1).submit().until_running(step=5)
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
    run = make("forbidden", hold_lives=1).submit().until_running(step=5)
    run.cluster.run("scontrol", "update", f"JobId={run.job}", "Requeue=0")
    run.cluster.run("scancel", "--signal=USR1", run.job)
    run.wait(lambda run: len(run.lives) == 2, 120, "no second life")
    assert run.files.load().job != run.job
    assert run.until_ended() == "COMPLETED"
    assert run.causes == ["interrupted", "done"] and run.repeated == 0


@scenario
def a_run_that_may_not_restart_waits_for_a_person(make):
    run = make("never", site={"requeue": "never"}, hold_lives=1).submit().until_running(step=5)
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
