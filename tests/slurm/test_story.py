"""What is said about a run and a cluster, without a cluster."""

import json
import os
import time
from pathlib import Path

import pytest

from slurm import scheduler, submit
from slurm.batch_files import tasks
from slurm.batch_files.site import site_from_dict
from slurm.job.state import Life, RunState, State, write
from slurm.status import describe, goodput, lines, status
from tests.slurm.plans import PROJECT, plan
from xlstm_io.errors import ConfigError

FACTS = {
    "KillWait": "30 sec",
    "SlurmdTimeout": "300 sec",
    "JobRequeue": "0",
    "PreemptMode": "CANCEL",
    "MaxArraySize": "1001",
}


def life(number, start, checkpoint, last, **more):
    ended = more.pop("ended", 100.0 * number)
    return Life(
        number,
        "7",
        number - 1,
        ("n1", "n2"),
        began=100.0 * (number - 1),
        start_step=start,
        ended=ended,
        checkpoint_step=checkpoint,
        last_step=last,
        **more,
    )


STATE = State(
    lives=(
        life(1, 0, 20, 26, cause="hang", reason="hang, rank 1 on n2: ...", node="n2"),
        life(2, 20, 40, 40, cause="interrupted", reason="interrupted", action="requeue"),
    ),
    excluded={"n2": "Xid 79"},
    job="7",
)


@pytest.fixture
def files(tmp_path):
    write(tmp_path / "progress.json", {"step": 40, "steps": 100, "step_seconds": 4.0})
    return RunState(tmp_path)


def test_the_story_has_every_life_and_the_steps_that_were_repeated(files):
    facts = describe(files, STATE, None)
    assert [one["repeated_steps"] for one in facts["lives"]] == [6, 0]
    assert facts["repeated_steps"] == 6 and facts["goodput"] == 0.8
    text = "\n".join(lines(facts))
    assert "step 40 of 100" in text and "left out: n2 (Xid 79)" in text
    assert "0-26 (-6)  hang, rank 1 on n2" in text
    assert "goodput so far: 80.0%" in text and "steps repeated: 6" in text


@pytest.mark.parametrize(
    ("state", "job", "said"),
    [
        (STATE, None, "no job is queued; python -m slurm resume"),
        (STATE, ("7", "RUNNING", "None", "N/A"), "job 7 runs"),
        (STATE, ("7", "PENDING", "JobHeldUser", "N/A"), "was left held; python -m slurm resume"),
        (
            STATE,
            ("7", "PENDING", "BeginTime", "12:00"),
            "is pending (BeginTime), expected to start",
        ),
        (State(STATE.lives, verdict="no more", job="7"), None, "given up: no more; after a cure"),
    ],
)
def test_what_comes_next_is_one_sentence(files, state, job, said):
    queued = None if job is None else scheduler.QueuedJob(*job)
    assert said in describe(files, state, queued)["next"]


def test_a_run_that_was_taken_back_is_finished_no_more(files):
    write(files.run / "summary.json", {"steps": 100})
    done = State((life(1, 0, 100, 100, action="done"),), job="7")
    assert describe(files, done, None)["next"] == "the run is finished"
    (files.run / "summary.json").unlink()  # as `pretrain rewind` does
    assert describe(files, done, None)["next"].startswith("no job is queued; python -m slurm")


def test_a_stop_that_was_asked_for_is_told(files):
    files.folder.mkdir()
    (files.folder / "STOP").touch()
    assert "stopped on request" in describe(files, STATE, None)["next"]


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Makes commands that say what they are told to, in place of all that this machine has."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def make(**said):
        for name, (code, text) in said.items():
            script = folder / name
            script.write_text(f"#!/bin/sh\necho '{text}' >&{2 if code else 1}\nexit {code}\n")
            script.chmod(0o755)

    return make


OPEN = State((*STATE.lives, life(3, 40, 0, 0, ended=None)), job="7")
LOCAL = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(270.0))
GONE = (1, "slurm_load_jobs error: Invalid job id specified")


@pytest.mark.parametrize(
    ("squeue", "sacct", "cause", "reason", "seconds"),
    [
        ((0, "7|RUNNING|None|N/A"), None, "at work", "", None),
        ((0, "7|PENDING|BeginTime|N/A"), None, "not known", "the next life finds out why", 50),
        (GONE, (0, f"NODE_FAIL|{LOCAL}"), "not known", "Slurm says NODE_FAIL", 70),
        (GONE, (0, "CANCELLED by 0|Unknown"), "not known", "Slurm says CANCELLED by 0", 50),
        (GONE, (1, "Slurm accounting storage is disabled"), "not known", "has no record", 50),
        (GONE, None, "not known", "Slurm has no record of it", 50),
        ((1, "Unable to contact slurm controller"), None, "at work", "", None),
        (None, None, "at work", "", None),
    ],
)
def test_a_life_that_nobody_saw_end_is_told_with_and_without_accounting(
    files, commands, capsys, squeue, sacct, cause, reason, seconds
):
    commands(**{n: said for n, said in (("squeue", squeue), ("sacct", sacct)) if said})
    os.utime(files.run / "progress.json", (250.0, 250.0))
    files.save(OPEN)
    assert status(files.run, as_json=True) == 0
    facts = json.loads(capsys.readouterr().out)
    told = facts["lives"][2]
    assert told["cause"] == cause and reason in told["reason"]
    assert told["seconds"] == seconds if seconds else told["seconds"] > 1e6
    assert (facts["goodput"] > 0.5) == bool(seconds)  # the time since then does not count
    assert [one["cause"] for one in facts["lives"][:2]] == ["hang", "interrupted"]


@pytest.mark.parametrize(
    ("said", "kind", "meaning", "remedy"),
    [
        (
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller "
            "(connect failure)",
            scheduler.NoAnswerError,
            "does not answer",
            "look with `squeue --me` whether the job is there before you repeat this",
        ),
        (
            "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
            scheduler.NoAnswerError,
            "does not answer",
            "scontrol ping",
        ),
        (
            "sbatch: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
            "sbatch: fatal: Could not establish a configuration source",
            scheduler.SlurmError,
            "does not know where",
            "set SLURM_CONF",
        ),
        (
            "sbatch: error: Munge encode failed: Failed to access /run/munge/munge.socket.2",
            scheduler.SlurmError,
            "does not believe who asks",
            "tell your admin",
        ),
        ("sbatch: error: invalid partition specified: x", scheduler.SlurmError, "", ""),
    ],
)
def test_a_tool_that_fails_is_explained_with_its_own_words(commands, said, kind, meaning, remedy):
    commands(sbatch=(1, said))
    with pytest.raises(scheduler.SlurmError) as caught:
        scheduler.submit(Path("train.sbatch"), [])
    error = str(caught.value)
    assert type(caught.value) is kind and all(words in error for words in (said, meaning, remedy))
    with pytest.raises(kind) as caught:
        scheduler.test_only(Path("train.sbatch"), [])
    assert (f"Slurm refuses train.sbatch: {said}" == str(caught.value)) == (not meaning)
    assert said in str(caught.value) and "squeue --me" not in str(caught.value)


def test_where_slurm_cannot_be_asked_that_is_said(files, commands, capsys):
    files.save(STATE)
    assert status(files.run) == 0
    said = capsys.readouterr().out
    assert "whether a job is queued is not known: squeue is not on this machine" in said
    assert "0-26 (-6)  hang, rank 1 on n2" in said


def test_goodput_counts_the_life_at_work_until_now():
    state = State((life(1, 0, 0, 0, ended=None),), job="7")
    assert goodput(state, {}) is None
    share = goodput(state, {"step": 10, "step_seconds": 1.0})
    assert share == pytest.approx(10 / time.time(), abs=1e-4)


def test_what_of_a_cluster_hurts_a_run_is_said(monkeypatch):
    site, job = site_from_dict({"partition": "main"}, "site.yaml"), plan()
    text = "\n".join(submit.what_hurts(FACTS, site, job))
    assert "JobRequeue=0" in text and "use requeue: chain" in text
    assert "noticed after SlurmdTimeout=300 s" in text and "a save takes" not in text
    saved = type("Progress", (), {"save_seconds": 90.0})()
    monkeypatch.setattr(submit, "read_progress", lambda folder: saved)
    assert "a save takes 90 s; KillWait is 30 s" in "\n".join(submit.what_hurts(FACTS, site, job))
    good = {"JobRequeue": "1", "PreemptMode": "REQUEUE", "SlurmdTimeout": "60 sec"}
    monkeypatch.setattr(submit, "read_progress", lambda folder: None)
    assert submit.what_hurts({**FACTS, **good}, site, job) == []


@pytest.mark.parametrize(
    ("save_s", "changes", "lost"),
    [
        (None, {}, None),
        (30.0, {}, None),
        (31.0, {}, "`scontrol requeue` or a preemption loses"),
        (31.0, {"GraceTime": "60"}, "`scontrol requeue` loses"),
        (91.0, {"GraceTime": "60"}, "`scontrol requeue` or a preemption loses"),
        (91.0, {"PreemptMode": "OFF"}, "`scontrol requeue` loses"),
    ],
)
def test_a_save_that_is_slower_than_killwait_is_said(save_s, changes, lost):
    found = scheduler.too_late_to_save(save_s, {**FACTS, **changes})
    assert found == [] if lost is None else lost in found[0]


def test_only_nodes_that_the_cluster_knows_are_excluded():
    assert scheduler.exclude_option({"n2": "x", "gone": "y"}, ["n1", "n2"]) == ["--exclude=n2"]
    assert scheduler.exclude_option({"gone": "y"}, ["n1"]) == []


def test_an_array_beyond_the_limit_of_the_cluster_is_refused(monkeypatch):
    monkeypatch.setattr(scheduler, "facts", lambda partition: FACTS)
    site = site_from_dict({"partition": "main"}, "site.yaml")
    plans = tasks.plan_preparation(Path("b.yaml"), Path("out"), site, 1002, folder=PROJECT)
    with pytest.raises(ConfigError, match="--nodes 1002: this cluster allows arrays of 1001"):
        tasks.submit_tasks(plans, site)
