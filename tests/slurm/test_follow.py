"""What follows a life in Slurm: the commands that are given, without a cluster."""

import itertools
import subprocess

import pytest

from slurm import scheduler
from slurm.job.decide import Action
from slurm.job.follow import follow, submit_next
from slurm.job.state import Policy, RunState, State

JOB = "4711"


class Slurm:
    """Stands in for Slurm's commands.

    Attributes:
        given: the commands that change something, in order.
        refused: names of subcommands that are refused.
        restarts: how often Slurm has requeued the job.
    """

    def __init__(self):
        self.given, self.refused, self.restarts = [], set(), 0

    def __call__(self, *words):
        answers = {"sinfo": "n1\nn2\nn3\n", "sbatch": "4712\n"}
        if words[1:4] == ("--oneliner", "show", "job"):
            answers["scontrol"] = f"JobId={JOB} Requeue=1 Restarts={self.restarts} BatchFlag=1"
        elif words[0] != "sinfo":
            self.given.append(" ".join(words))
        code = int(bool(self.refused & {words[0], words[1]}))
        answer = "" if code else answers.get(words[0], "")
        return subprocess.CompletedProcess(words, code, answer, "not permitted" if code else "")


@pytest.fixture
def slurm(monkeypatch):
    slurm = Slurm()
    monkeypatch.setattr(scheduler, "_run", slurm)
    return slurm


@pytest.fixture
def files(tmp_path):
    files = RunState(tmp_path)
    files.save_policy(Policy(steps=100))
    files.save(State(job=JOB))
    return files


def after(files, action=Action.REQUEUE, *, wait_s=0, interrupted=False, life=1):
    follow(files, JOB, 0, life=life, action=action, wait_s=wait_s, interrupted=interrupted)


def test_the_same_job_runs_again(files, slurm):
    after(files)
    assert slurm.given == [f"scontrol requeue {JOB}"]


def test_a_controller_that_is_away_for_a_while_ends_no_run(files, slurm, monkeypatch):
    """It restarts at the very moment at which a life ends."""
    slept, calls = [], itertools.count()
    silent = "slurm_load_node error: Unable to contact slurm controller (connect failure)"

    def away(*words):
        is_away = next(calls) in (0, 1, 3) or words[0] == "squeue"
        return subprocess.CompletedProcess(words, 1, "", silent) if is_away else slurm(*words)

    monkeypatch.setattr(scheduler, "_run", away)
    monkeypatch.setattr(scheduler.time, "sleep", slept.append)
    after(files)
    assert slurm.given == [f"scontrol requeue {JOB}"] and slept == [scheduler.RETRY_S] * 3
    # No person is kept waiting, and what is not known at the start of a life ends it neither.
    with pytest.raises(scheduler.NoAnswerError):
        scheduler.end_of(JOB), scheduler.first_queued([JOB])
    assert scheduler.running_jobs() == [] and len(slept) == 3


def test_a_job_whose_answer_was_lost_is_not_submitted_twice(files, slurm, monkeypatch, capsys):
    """Two jobs that begin at one moment would both take the run."""
    slurm.refused.add("requeue")
    lost = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"

    def answers_late(*words):
        done = slurm(*words)
        first = words[0] == "sbatch" and len(slurm.given) == 2
        return subprocess.CompletedProcess(words, 1, "", lost) if first else done

    monkeypatch.setattr(scheduler, "_run", answers_late)
    monkeypatch.setattr(scheduler.time, "sleep", lambda seconds: None)
    after(files)
    assert [words.split()[0] for words in slurm.given] == ["scontrol", "sbatch"]
    assert "look with `squeue --me` whether the job is there" in capsys.readouterr().err


def test_nothing_follows_the_end_of_a_run(files, slurm):
    for action in (Action.DONE, Action.STOP, Action.FAIL):
        after(files, action)
    files.save_policy(Policy(steps=100, mode="never"))
    after(files)
    assert slurm.given == []


def test_a_job_waits_and_leaves_nodes_out_while_it_is_held(files, slurm):
    """Nodes that this cluster does not know are not named: Slurm would refuse the others too."""
    files.save(State(job=JOB, excluded={"n3": "x", "gone": "y", "n1": "z"}))
    slurm.refused.add("update")
    after(files, wait_s=60)
    assert slurm.given == [
        f"scontrol requeuehold {JOB}",
        f"scontrol update JobId={JOB} ExcNodeList=n1,n3 StartTime=now+60",
        f"scontrol release {JOB}",  # in any case: a held job would wait for a person
    ]


def test_where_a_requeue_is_forbidden_a_new_job_goes_on(files, slurm, capsys):
    files.save(State(job=JOB, excluded={"n3": "x"}))
    slurm.refused.add("requeuehold")
    after(files, wait_s=60)
    batch = f"{files.folder}/train.sbatch"
    assert slurm.given[1:] == [
        f"sbatch --parsable --exclude=n3 --dependency=afterany:{JOB} --begin=now+60 {batch}"
    ]
    assert files.load().job == "4712"
    said = capsys.readouterr().err
    assert "no requeue: scontrol: not permitted" in said and "the next job is 4712" in said


def test_a_new_job_that_is_refused_is_said(files, slurm, capsys):
    slurm.refused.add("sbatch")
    submit_next(files, "--dependency=singleton")
    assert files.load().job == JOB
    assert "no next job: sbatch: not permitted" in capsys.readouterr().err


def test_in_a_chain_the_job_that_waits_goes_on_or_is_cancelled(files, slurm):
    files.save(State(job="4712", excluded={"n2": "x"}))
    after(files, wait_s=60)
    assert slurm.given == ["scontrol update JobId=4712 ExcNodeList=n2 StartTime=now+60"]
    after(files, Action.DONE)
    assert slurm.given[1:] == ["scancel 4712"]


def test_a_job_that_slurm_has_requeued_itself_is_left_alone(files, slurm):
    slurm.restarts = 1
    after(files, interrupted=True)
    assert slurm.given == []


@pytest.mark.parametrize(
    ("own", "given"),
    [
        ("", ["scancel 4712"]),
        (f"slurmstepd: error: *** JOB {JOB} ON n1 CANCELLED AT now ***\n", ["scancel 4712"]),
        (f"*** JOB {JOB} ON n1 CANCELLED AT now DUE TO TIME LIMIT ***\n", []),
    ],
)
def test_a_cancelled_job_stays_cancelled_and_a_time_limit_does_not(files, slurm, own, given):
    """The life before has met a time limit, which says nothing about this one."""
    first = f"*** JOB {JOB} ON n1 CANCELLED AT then DUE TO TIME LIMIT ***\n"
    text = f"... xlstm: life 1 on n1\n{first}... xlstm: life 2 on n1\n{own}"
    (files.folder / f"{JOB}.out").write_text(text)
    files.save(State(job="4712"))
    after(files, interrupted=True, life=2)
    assert slurm.given == given
