"""One life of a run at a time: who gets the lease, who is refused, who learns that it is over."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from pretrain.supervision import lease as lease_module
from pretrain.supervision.lease import (
    Lease,
    LeaseHeldError,
    newest_life,
    next_life,
    take_run,
)
from xlstm_io.checkpoint.lives import record_start
from xlstm_io.errors import Superseded
from xlstm_io.holder import Holder

TAKE = """
import os, sys
from pathlib import Path
from pretrain.supervision.lease import Lease
Lease.take(Path(sys.argv[1]))
"""


def held_by(folder, life, status="running", **other):
    """A lease that another process took, as it lies on disk."""
    holder = Holder.here(life).__dict__ | {"pid": 1, "started": 1} | other
    (folder / "lives").mkdir(parents=True, exist_ok=True)
    (folder / "lives" / f"{life:06d}.json").write_text(json.dumps(holder))
    (folder / "lease.json").write_text(json.dumps({**holder, "status": status}))


def test_lives_are_numbered_and_given_back(tmp_path):
    for number in (1, 2, 3):
        with Lease.take(tmp_path / "run") as lease:
            assert lease.life == number == newest_life(tmp_path / "run")
            lease.check()
    assert json.loads((tmp_path / "run" / "lease.json").read_text())["status"] == "ended"


def test_a_living_process_of_this_machine_keeps_its_lease(tmp_path):
    with Lease.take(tmp_path):
        with pytest.raises(LeaseHeldError, match=rf"process {os.getpid()} on .* is running"):
            Lease.take(tmp_path)
        assert newest_life(tmp_path) == 1


def test_a_dead_process_of_this_machine_is_followed_at_once(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from pretrain.supervision.lease import Lease\n"
    )
    script += "Lease.take(Path(sys.argv[1])); os._exit(9)"
    child = subprocess.run([sys.executable, "-c", script, str(tmp_path)])
    assert child.returncode == 9
    with Lease.take(tmp_path) as lease:
        assert lease.life == 2


def test_a_process_number_that_was_given_anew_is_not_the_holder(tmp_path):
    """This process has the number, but it started at another time."""
    held_by(tmp_path, 1, pid=os.getpid(), started=Holder.here(1).started - 1)
    assert Lease.take(tmp_path).life == 2


def test_a_stopped_process_still_holds_its_lease(tmp_path):
    script = TAKE + "print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(tmp_path)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        child.send_signal(19)
        time.sleep(0.1)
        with pytest.raises(LeaseHeldError, match="is running"):
            Lease.take(tmp_path)
    finally:
        child.kill()
        child.wait()
    assert Lease.take(tmp_path).life == 2


def test_another_machine_is_waited_for_until_it_was_silent_long_enough(tmp_path):
    held_by(tmp_path, 1, host="elsewhere", boot="another")
    with pytest.raises(LeaseHeldError, match=r"process 1 on elsewhere.* gone after 300 s"):
        Lease.take(tmp_path)
    past = time.time() - lease_module.STALE_S - 1
    for path in (tmp_path / "lease.json", tmp_path / "lives" / "000001.json"):
        os.utime(path, (past, past))
    assert Lease.take(tmp_path).life == 2


def test_a_lease_that_was_given_back_is_taken_at_once(tmp_path):
    held_by(tmp_path, 4, status="ended", host="elsewhere", boot="another")
    assert Lease.take(tmp_path).life == 5


def test_a_requeued_job_follows_itself_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    held_by(tmp_path, 1, host="elsewhere", boot="another", job="77", restart=2)
    assert Lease.take(tmp_path).life == 2


def test_a_run_that_torchrun_starts_on_another_node_waits_for_the_lost_one(
    tmp_path, monkeypatch, capsys
):
    """Its rank 0 was there. torchrun would use up its restarts in the time of that silence."""
    lost = {"host": "elsewhere", "boot": "another", "torchrun": "nightly"}
    held_by(tmp_path, 1, **lost)

    def pass_time(seconds):
        past = (tmp_path / "lease.json").stat().st_mtime - 100
        for path in (tmp_path / "lease.json", tmp_path / "lives" / "000001.json"):
            os.utime(path, (past, past))

    monkeypatch.setattr(lease_module.time, "sleep", pass_time)
    for name in ("other", "none"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        with pytest.raises(LeaseHeldError, match="gone after 300 s"):
            Lease.take(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "nightly")
    assert Lease.take(tmp_path).life == 2
    said = capsys.readouterr().err
    assert said.count("waiting, as torchrun has started the run again: run.dir=") == 1


def test_a_folder_that_was_renamed_and_begun_anew_is_another_runs(tmp_path):
    """Its lives are numbered from 1, and this one would save among its checkpoints."""
    run, old = tmp_path / "run", tmp_path / "old"
    for _ in range(2):
        with Lease.take(run, take_over=True) as lease:
            lease.check()
            run.rename(old)
            lease.check()  # nobody has it: what is not saved would be lost
            held_by(run, 1, host="elsewhere")
            with pytest.raises(Superseded, match=r"life 1 .* on elsewhere.* has taken over"):
                lease.check()
        assert json.loads((run / "lease.json").read_text())["status"] == "running"
        for path in (run, run / "lives"):
            for file in path.glob("*.json"):
                file.unlink()
        (run / "lives").rmdir(), run.rmdir(), old.rename(run)


def test_a_second_step_of_the_same_job_is_refused(tmp_path, monkeypatch):
    """On another node, where the first one's process is not seen."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    held_by(tmp_path, 1, host="elsewhere", boot="another", job="77")
    with pytest.raises(LeaseHeldError, match="job 77"):
        Lease.take(tmp_path)


def test_another_container_of_this_machine_is_waited_for(tmp_path):
    """Its processes are not seen here, so that none of them says that the holder is gone."""
    held_by(tmp_path, 1, namespace="pid:[1]")
    with pytest.raises(LeaseHeldError, match="gone after 300 s"):
        Lease.take(tmp_path)


@pytest.mark.parametrize(
    ("answer", "ended"),
    [
        ("echo RUNNING", False),
        ("true", True),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", False),
    ],
    ids=["running", "listed no more", "forgotten", "no answer"],
)
def test_the_job_of_the_holder_is_asked_for(tmp_path, monkeypatch, answer, ended):
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(f"#!/bin/sh\n{answer}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    held_by(tmp_path / "run", 1, host="elsewhere", boot="another", job="78")
    if ended:
        assert Lease.take(tmp_path / "run").life == 2
    else:
        with pytest.raises(LeaseHeldError, match="job 78"):
            Lease.take(tmp_path / "run")


def test_a_lease_can_be_taken_over_by_choice(tmp_path):
    with Lease.take(tmp_path) as old, Lease.take(tmp_path, take_over=True) as new:
        assert new.life == 2
        new.check()
        with pytest.raises(Superseded, match=r"life 2 .*has taken over .* from life 1"):
            old.check()
    # The old one did not write its end over the new one's.
    assert json.loads((tmp_path / "lease.json").read_text())["life"] == 2


def test_of_many_that_start_at_once_one_gets_the_lease(tmp_path):
    taken, refused, barrier = [], [], threading.Barrier(8)

    def start():
        barrier.wait()
        try:
            taken.append(Lease.take(tmp_path))
        except LeaseHeldError:
            refused.append(1)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1 and len(refused) == 7


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert Lease.take(tmp_path).life == 1
    assert Lease.take(tmp_path, take_over=True).life == 2


def test_the_number_is_beyond_those_among_the_checkpoints(tmp_path):
    """The run folder in which those lives were numbered may be lost."""
    run, checkpoints = tmp_path / "run", tmp_path / "checkpoints"
    record_start(checkpoints, 12, 100, run=tmp_path / "lost")
    assert next_life(run, checkpoints) == 13
    assert take_run(run, checkpoints).life == 13
    assert take_run(run, checkpoints, after=20, take_over=True).life == 21
    assert next_life(run, checkpoints) == 22


def test_checkpoints_that_another_run_folder_writes_are_refused(tmp_path):
    run, other, checkpoints = (tmp_path / name for name in ("run", "other", "checkpoints"))
    with take_run(other, checkpoints) as lease:
        record_start(checkpoints, lease.life, 0, run=other)
        with pytest.raises(LeaseHeldError, match=rf"checkpoint.dir={checkpoints}, also that of"):
            take_run(run, checkpoints)
        assert newest_life(run) == 0
        assert take_run(run, checkpoints, take_over=True).life == 2
    assert take_run(tmp_path / "third", checkpoints).life == 2


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_sign_of_life_is_renewed_and_stops_when_superseded(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "RENEW_S", 0.02)
    with Lease.take(tmp_path) as lease:
        (tmp_path / "lease.json").unlink()
        wait_for((tmp_path / "lease.json").exists)
        held_by(tmp_path, 2, host="elsewhere", boot="another")
        wait_for(lambda: lease.lost)  # a renewal that had begun before is over now
        held_by(tmp_path, 2, host="elsewhere", boot="another")
        time.sleep(0.2)
        assert json.loads((tmp_path / "lease.json").read_text())["host"] == "elsewhere"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"life": 1}'])
def test_a_damaged_record_is_waited_for_and_then_passed(tmp_path, damage):
    held_by(tmp_path, 1)
    for path in (tmp_path / "lives" / "000001.json", tmp_path / "lease.json"):
        path.write_text(damage)
    with pytest.raises(LeaseHeldError, match="life 1 gave its last sign"):
        Lease.take(tmp_path)
    assert Lease.take(tmp_path, take_over=True).life == 2
