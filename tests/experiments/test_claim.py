"""Claims: one owner at a time, whoever looks, whoever is killed, and however long it takes."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from experiments import claim as module
from experiments.claim import Claim


@pytest.fixture
def claim(tmp_path):
    return Claim(tmp_path / "claims" / "x")


def rewrite(claim, **fields):
    """Let the claim be of another owner."""
    path = claim.folder / "owner.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def silence(claim):
    long_ago = time.time() - 1000
    os.utime(claim.folder, (long_ago, long_ago))


def test_a_claim_is_one_owners_until_he_is_gone(claim):
    assert claim.take() and not claim.take()
    assert claim.owner() == f"process {os.getpid()} on {os.uname().nodename}"
    claim.release()
    assert claim.owner() is None and claim.take()
    # A process that has ended on this machine.
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    rewrite(claim, pid=ended.pid)
    assert claim.take()
    # One of another machine, first at work and then silent.
    rewrite(claim, host="other")
    assert not claim.take()
    silence(claim)
    assert claim.take()
    claim.release()
    assert not list(claim.folder.parent.iterdir())


def test_a_process_number_that_another_has_now_is_no_owner(claim):
    """After a new start of the machine, or in a container, small numbers are soon in use again."""
    assert claim.take()
    silence(claim)
    assert not Claim(claim.folder).take(), "at work, if silent"
    rewrite(claim, started=1)
    assert Claim(claim.folder).take()


def test_a_job_that_was_requeued_takes_its_own_claim_at_once(claim, monkeypatch):
    assert claim.take()
    rewrite(claim, host="failed", job="7_3", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "7_3")
    assert not Claim(claim.folder).take(), "a second step of the same life"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert Claim(claim.folder).take()


def test_of_two_that_find_a_claim_left_one_takes_it(claim, monkeypatch):
    """The second looked before the first took it, and moves afterwards."""
    assert claim.take()
    rewrite(claim, host="other")
    silence(claim)
    first, second = Claim(claim.folder), Claim(claim.folder)
    look = second._is_left

    def overtaken():
        left = look()
        assert first.take()
        return left

    monkeypatch.setattr(second, "_is_left", overtaken)
    assert not second.take()
    assert first._inode() == first._ours


def test_who_lost_a_claim_neither_touches_nor_releases_the_next_owners(claim):
    assert claim.take()
    rewrite(claim, host="other")
    silence(claim)
    after = Claim(claim.folder)
    assert after.take()
    silence(after)
    claim.touch()
    assert time.time() - after.folder.stat().st_mtime > 900
    claim.release()
    assert after.owner() is not None


def test_a_claim_is_touched_while_its_owner_makes_something(claim, monkeypatch):
    monkeypatch.setattr(module, "TOUCH_S", 0.01)
    assert claim.take()
    silence(claim)
    before = claim._touched()
    with claim.held():
        end = time.monotonic() + 10
        while claim._touched() == before and time.monotonic() < end:
            time.sleep(0.01)
        assert time.time() - claim.folder.stat().st_mtime < 100
    assert not claim.folder.exists()
    assert all(thread.name != "claim" for thread in threading.enumerate())


def test_an_owner_shows_life_by_a_touch(claim, monkeypatch):
    monkeypatch.setattr(module, "STALE_S", 0.2)
    monkeypatch.setattr(module, "TOUCH_S", 0.1)
    assert not claim.shows_life(), "nobody has it"
    assert claim.take()
    assert claim.shows_life(), "silent, but its process is there"
    rewrite(claim, host="other")
    silence(claim)
    assert not claim.shows_life()
    os.utime(claim.folder)
    monkeypatch.setattr(module, "STALE_S", 60.0)
    threading.Timer(0.2, os.utime, [claim.folder]).start()
    assert claim.shows_life()
