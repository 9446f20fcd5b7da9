"""Begin and end of a life: what the batch script is told, and what is written down."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from slurm import scheduler
from slurm.job import life as lives
from slurm.job.rank import xids
from slurm.job.state import Life, Policy, RankRecord, RunState, State, write
from slurm.job_files import copy_job_files
from slurm.submit import note_submission
from xlstm_io.checkpoint.lives import record_start
from xlstm_io.errors import ExitCode

JOB = "4711"


@pytest.fixture
def files(tmp_path):
    run = RunState(tmp_path / "a run")
    run.save_policy(Policy(steps=100, checkpoints=str(run.run / "checkpoints")))
    return run


def begin(files, job=JOB, restart=0, nodes=("n1", "n2"), running=()):
    return lives.begin(files, job, restart, nodes, running)


def put_record(files, number, rank=0, code=75, host="n1", step_id=0, tail=()):
    write(
        files.life_folder(number) / f"rank-{rank:05d}.json",
        RankRecord(rank, host, step_id, code, 1.0, 2.0, tuple(tail)).__dict__,
    )


def put_checkpoint(files, step, complete=True, life=1):
    folder = files.run / "checkpoints" / f"step-{step:08d}-abc{life}"
    folder.mkdir(parents=True)
    if complete:
        manifest = {"complete": True, "step": step, "state": {"life": life}}
        (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_life_begins_and_ends_and_the_next_goes_on(files):
    told = begin(files)
    assert told["LIFE"] == 1 and told["PORT"] == 20000 + (4711 + 37) % 12000
    assert told["BURN"] == -1 and (told["HEAD"], told["NODES"]) == ("n1", "n1 n2")
    put_record(files, 1)
    put_checkpoint(files, 20)
    put_checkpoint(files, 30, complete=False)
    write(files.run / "progress.json", {"step": 24, "stragglers": ["n2"]})
    told = lives.end(files, 1, tries=1)
    assert (told["ACTION"], told["EXIT"], told["WAIT"]) == ("requeue", 75, 0)
    assert files.load().excluded == {"n2": "slow for long"}, "the trainer has found it slow"
    (life,) = files.load().lives
    assert (life.checkpoint_step, life.last_step, life.cause) == (20, 24, "interrupted")
    assert begin(files, restart=1)["LIFE"] == 2
    assert files.load().lives[1].start_step == 20
    story = map(json.loads, (files.folder / "story.jsonl").read_text().splitlines())
    assert [line["event"] for line in story] == ["begin", "requeue", "begin"]


def test_a_life_after_a_rewind_is_measured_from_there(files):
    """What the run has left behind counts for the trainer no more, and so not here."""
    for step in (80, 60, 40):
        put_checkpoint(files, step)
    checkpoints = files.run / "checkpoints"
    record_start(checkpoints, 1, 0)
    record_start(checkpoints, 2, 40, skip_samples=8)  # the rewind
    record_start(checkpoints, 3, 40)
    (checkpoints / "lives" / "000004.json").write_text("{")
    for restart, step in enumerate((50, 55, 60, 65)):
        told = begin(files, restart=restart)
        put_checkpoint(files, step, life=3)
        put_record(files, told["LIFE"], code=1, tail=["ValueError: what"])
        assert lives.end(files, told["LIFE"], tries=1)["ACTION"] == "requeue"
    found = files.load().lives
    assert [life.start_step for life in found] == [40, 50, 55, 60]
    assert [life.checkpoint_step for life in found] == [50, 55, 60, 65]


def test_a_finished_run_starts_no_life(files):
    write(files.run / "summary.json", {"steps": 100})
    told = begin(files)
    assert told["EXIT"] == 0 and "all 100 steps are done" in told["REASON"]
    assert files.load() == State()
    files.save_policy(replace(files.policy(), steps=200))
    assert begin(files)["LIFE"] == 1, "it is to have more steps by now"


def test_a_run_that_another_job_is_at_work_on_is_left_alone(files):
    begin(files)
    before = files.load()
    told = begin(files, job="4712", running=("4711", "4712"))
    assert told == {"EXIT": 0, "REASON": "job 4711 is at work on this run"}
    assert files.load() == before
    assert begin(files, job="4712", running=("4712",))["LIFE"] == 2


def test_a_life_whose_batch_script_was_killed_is_closed_by_the_next(files):
    begin(files)
    put_record(files, 1, rank=0, code=1, tail=["Connection reset by peer"])
    put_record(files, 1, rank=1, code=None, host="n2")
    begin(files, restart=1)
    first, second = files.load().lives
    assert (first.cause, first.node, first.action) == ("node lost", "n2", "requeue")
    assert second.ended is None


def test_the_cap_holds_for_lives_that_were_all_killed(files):
    for restart in range(3):
        assert begin(files, restart=restart)["LIFE"] == restart + 1
    told = begin(files, restart=3)
    assert told["EXIT"] == 0 and "left no newer checkpoint" in told["REASON"]
    assert "left no newer checkpoint" in files.load().verdict
    assert begin(files, restart=4)["EXIT"] == 0


def test_a_stop_request_starts_no_life(files):
    begin(files)
    (files.folder / "STOP").touch()
    put_record(files, 1)
    assert lives.end(files, 1, tries=1)["ACTION"] == "stop"
    assert "a stop was asked for" in begin(files)["REASON"]


@pytest.mark.parametrize(
    ("code", "most", "ends_with"),
    [
        (ExitCode.BAD_INPUT, 100, ExitCode.BAD_INPUT),
        (ExitCode.DIVERGED, 100, ExitCode.DIVERGED),
        (ExitCode.HANG, 1, ExitCode.HANG),
        (ExitCode.MACHINE_FAILED, 1, ExitCode.BUG),
    ],
)
def test_the_batch_script_ends_with_the_code_of_a_failure(files, code, most, ends_with):
    files.save_policy(replace(files.policy(), total=most))
    begin(files)
    put_record(files, 1, code=int(code), tail=["error: data.path is not a folder"])
    told = lives.end(files, 1, tries=1)
    assert (told["ACTION"], told["EXIT"]) == ("fail", ends_with)
    assert "data.path is not a folder" in begin(files)["REASON"]


def test_nodes_stay_left_out_when_a_later_life_ends(files):
    begin(files)
    write(files.run / "progress.json", {"step": 24, "stragglers": ["n2"]})
    lives.end(files, 1, tries=1)
    write(files.run / "progress.json", {"step": 48})
    begin(files, restart=1, nodes=("n1", "n3"))
    lives.end(files, 2, tries=1)
    assert files.load().excluded == {"n2": "slow for long"}


def test_a_port_in_use_is_tried_again_in_the_same_life(files):
    first = begin(files)
    put_record(files, 1, code=1, tail=["EADDRINUSE"])
    told = lives.end(files, 1, tries=1)
    assert told["ACTION"] == "retry" and told["PORT"] != first["PORT"]
    assert files.load().lives[0].ended is None
    assert files.records(1) == []
    assert (files.life_folder(1) / "try-1/rank-00000.json").exists()


def test_the_batch_script_of_a_node_that_was_cut_off_changes_nothing(files):
    begin(files)
    begin(files, restart=1, nodes=("n3", "n4"))
    before = files.load()
    assert lives.end(files, 1, tries=1)["ACTION"] == "leave"
    assert files.load() == before and before.lives[-1].number == 2


def test_a_person_who_submits_again_gives_the_run_all_its_lives(files):
    for restart in range(4):
        told = begin(files, restart=restart)
    assert "left no newer checkpoint" in told["REASON"]
    note_submission(files, "4712")
    for restart in range(2):
        told = begin(files, job="4712", restart=restart)
        assert lives.end(files, told["LIFE"], tries=1)["ACTION"] == "requeue"
    told = begin(files, job="4712", restart=2)
    assert lives.end(files, told["LIFE"], tries=1)["ACTION"] == "fail"
    assert len(files.load().lives) == 6


def test_step_ids_of_the_same_job_are_used_up(files):
    begin(files)
    put_record(files, 1, step_id=3)
    lives.end(files, 1, tries=1)
    state = files.load()
    assert lives.step_id_to_reach(state, JOB, 1) == 3 == begin(files, restart=1)["BURN"]
    assert lives.step_id_to_reach(state, JOB, 9) == 8  # lives that ended before their ranks began
    assert lives.step_id_to_reach(state, "4712", 0) == -1


def test_a_number_is_never_used_twice(files):
    files.life_folder(1).mkdir(parents=True)  # another job was faster
    assert begin(files)["LIFE"] == 2


def test_a_checkpoint_on_an_object_store_is_known_from_the_progress_file(files):
    files.save_policy(Policy(steps=100, checkpoints=None))
    write(files.run / "progress.json", {"step": 24, "checkpoint_step": 20})
    assert files.newest_step(files.policy()) == 20


def test_a_damaged_record_counts_as_missing(files):
    put_record(files, 1)
    (files.life_folder(1) / "rank-00001.json").write_text('{"rank": 1')
    assert [record.rank for record in files.records(1)] == [0]


def test_the_state_survives_its_files(files):
    life = Life(1, JOB, 0, ("n1",), 1.0, 0, ended=2.0, cause="hang", node="n1")
    state = State((life,), {"n1": "Xid 79"}, "given up", "4711")
    files.save(state)
    assert files.load() == state
    (files.folder / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        files.load()


def test_a_folder_without_a_submission_is_one_message(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "slurm.job.life", "end", str(tmp_path), "--job", JOB],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert "policy.json cannot be read" in done.stderr


def test_the_job_runs_from_its_copies_alone(files, tmp_path):
    """An isolated Python with nothing installed: no torch, no pydantic, no package of ours."""
    files.save_policy(replace(files.policy(), stops_in_time=True))
    job = files.folder / "job"
    copy_job_files(job)
    script = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from slurm.job import life; life.main"
    )
    script += "(sys.argv[1:]); print(*sorted(m for m in sys.modules if m.startswith(('slurm.'"
    script += ", 'xlstm_io'))), file=sys.stderr)"
    words = [sys.executable, "-I", "-S", "-c", script, str(job), "begin", str(files.run)]
    for name, answer in (("scontrol", "n1\\nn2"), ("squeue", "2030-01-02T03:04:05")):
        (tmp_path / name).write_text(f"#!/bin/sh\nprintf '{answer}'\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = subprocess.run(
        [*words, "--job", JOB], env=environment, capture_output=True, text=True, check=True
    )
    told = dict(line.split("=", 1) for line in shlex.split(done.stdout))
    assert told["XLSTM_LIFE"] == "1"
    assert told["XLSTM_LIFE_FOLDER"] == str(files.life_folder(1))  # with its space
    assert (told["XLSTM_HEAD"], told["XLSTM_NODES"]) == ("n1", "n1 n2")
    assert time.localtime(float(told["XLSTM_JOB_END"]))[:6] == (2030, 1, 2, 3, 4, 5)
    assert "xlstm: life 1 on n1 n2" in done.stderr and "slurm.job.decide" in done.stderr
    for module in ("health", "evaluations"):  # which other jobs ask
        words = [sys.executable, "-S", "-P", "-c", f"import slurm.job.{module}"]
        subprocess.run(words, env={**environment, "PYTHONPATH": str(job)}, cwd="/", check=True)


def test_the_ranks_are_told_when_the_job_ends(tmp_path):
    """What bash hands to the training step of what the job was told at its begin."""
    script = """
        source "$1"
        xlstm_ask() {
            case $1 in begin) XLSTM_JOB_END=1.5;; end) XLSTM_ACTION=stop XLSTM_EXIT=0;; esac
        }
        xlstm_report() { :; }
        xlstm_train_step() { exec printenv XLSTM_JOB_END; }
        xlstm_life
    """
    words = ["bash", "-uc", script, "bash", str(Path(lives.__file__).with_name("batch.sh"))]
    environment = {**os.environ, "XLSTM_RUN": str(tmp_path)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert "1.5" in done.stdout.splitlines()


@pytest.mark.parametrize("said", ["NONE", "N/A", "Unknown", ""])
def test_a_job_without_a_time_limit_has_no_end(tmp_path, monkeypatch, said):
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '{said}'\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert scheduler.end_of(JOB) is None
    (tmp_path / "squeue").unlink()
    assert scheduler.end_of(JOB) is None


# One rank ---------------------------------------------------------------------------------------

RANK_VARIABLES = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "2",
    "SLURMD_NODENAME": "n2",
    "XLSTM_TASKS_PER_NODE": "2",
}


def run_rank(files, tmp_path, script, number=None):
    """Run rank.py with a Python script as its command; (exit code, record, log)."""
    folder = files.life_folder(1)
    folder.mkdir(parents=True)
    job = files.folder / "job"
    copy_job_files(job)
    command = [sys.executable, "-S", str(job / "slurm/job/rank.py"), str(folder), "--"]
    process = subprocess.Popen(
        [*command, sys.executable, "-S", "-c", script], env={**os.environ, **RANK_VARIABLES}
    )
    if number is not None:
        limit = time.monotonic() + 20
        while not (folder / "rank-00003.log").exists() and time.monotonic() < limit:
            time.sleep(0.01)
        process.send_signal(number)
    files.ended = code = process.wait(30)
    (record,) = files.records(1)
    return code, record, (folder / "rank-00003.log").read_text()


def test_a_rank_gets_torchruns_variables_and_leaves_its_last_lines(files, tmp_path):
    script = """
import os, sys
print(*(os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
print("Traceback", file=sys.stderr); sys.exit("ValueError: what")
"""
    code, record, log = run_rank(files, tmp_path, script)
    assert code == 1 and "3 4 1 2" in log
    assert (record.rank, record.host, record.step_id, record.code) == (3, "n2", 2, 1)
    assert record.last_line == "ValueError: what" and record.time > record.began > 0


def test_stopped_is_no_failure_for_slurm_but_it_is_recorded(files, tmp_path):
    code, record, _ = run_rank(files, tmp_path, "import sys; sys.exit(75)")
    assert (code, record.code) == (0, 75)


def test_a_rank_that_cannot_write_its_record_still_ends_as_it_did(files, tmp_path):
    """A full disk: srun would take it for a failure, and end rank 0, which still saves."""
    path = files.life_folder(1) / "rank-00003.json"
    script = f"import os, sys; os.unlink({str(path)!r}); os.mkdir({str(path)!r}); sys.exit(75)"
    with pytest.raises(ValueError, match="not enough values"):  # there is no record
        run_rank(files, tmp_path, script)
    assert path.is_dir() and files.ended == 0


def test_a_job_whose_disk_fails_ends_with_one_message(files):
    (files.folder / "state.json").mkdir(parents=True)
    words = [sys.executable, "-m", "slurm.job.life", "end", str(files.run), "--life", "1"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert "Is a directory" in done.stderr and done.stderr.count("\n") == 1


def test_a_killed_rank_says_by_which_signal(files, tmp_path):
    code, record, _ = run_rank(files, tmp_path, "import os; os.kill(os.getpid(), 9)")
    assert (code, record.code, record.out_of_memory) == (137, -9, False)


def test_a_signal_during_the_imports_waits_for_the_handlers(files, tmp_path):
    """The mask of rank.py survives exec, and a signal sent meanwhile stays pending."""
    script = """
import os, signal, sys, time
os.kill(os.getpid(), signal.SIGUSR1)  # as Slurm signals every process of a step
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
time.sleep(20)
"""
    code, record, _ = run_rank(files, tmp_path, script, signal.SIGUSR1)
    assert (code, record.code) == (0, 75)


def test_xid_messages_since_the_start_are_found():
    text = (
        "[   10.5] NVRM: Xid (PCI:0000:01:00): 13, pid=1\n"
        "[  100.25] NVRM: Xid (PCI:0000:01:00): 79, pid='<unknown>', GPU has fallen off the bus.\n"
        "[  101.25] something else\n"
    )
    assert xids(text, 50.0) == [79]
