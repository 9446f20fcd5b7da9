"""A rank that stands still says where and ends; one that moves is left alone."""

import json
import pickle
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.distributed.flight_recorder.components.loader import read_dump

from pretrain.config import GuardConfig
from pretrain.supervision import watchdog as watchdog_module
from pretrain.supervision.watchdog import CHECKPOINT, EVALUATION, STARTUP, STEP, Limits, Watchdog
from xlstm_io.errors import ExitCode

LIMITS = Limits(step=0.2, startup=0.6, checkpoint=0.6)


class Clock:
    """A clock for the watchdog that stands still until a test moves it, however busy the machine.

    Attributes:
        now: seconds.
        looks: how often the watchdog's thread has looked at it.
    """

    def __init__(self):
        self.now, self.looks = 0.0, 0

    def monotonic(self):
        if threading.current_thread().name == "watchdog":
            self.looks += 1
        return self.now

    def seen(self):
        """Wait until the watchdog has judged the time as it is now."""
        looks = self.looks
        wait_for(lambda: self.looks > looks + 1)  # the first may have begun before


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(watchdog_module, "time", clock)
    monkeypatch.setattr(watchdog_module, "TICK_S", 0.02)  # of real time
    return clock


def watch(folder, limits=LIMITS):
    """A watchdog, and the list of codes that it ended the process with."""
    ends = []
    return Watchdog(folder, 3, limits, end=ends.append), ends


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_rank_that_stands_still_writes_its_stacks_and_ends(tmp_path, clock):
    watchdog, ends = watch(tmp_path / "logs")
    with watchdog:
        watchdog.moved(STEP, 41)
        clock.now = 0.3
        wait_for(lambda: ends)
    assert ends == [ExitCode.HANG]
    text = (tmp_path / "logs" / "hang-3.txt").read_text()
    assert (
        "rank 3 has made no progress for 0 s (limit 0 s, guard.hang_timeout) in its step, " in text
    )
    assert "wait_for" in text  # where the main thread stood
    about = json.loads((tmp_path / "logs" / "phase-3.json").read_text())
    assert about == {"rank": 3, "phase": "step", "step": 41}


def test_the_message_says_what_the_rank_waits_for(tmp_path, capfd):
    watchdog, ends = watch(tmp_path)
    watchdog.ask(lambda: "the next batch")
    with watchdog:
        watchdog.moved(STEP, 41)
        wait_for(lambda: ends)
    words = "in its step, after step 41: it waits for the next batch"
    assert words in capfd.readouterr().err and words in (tmp_path / "hang-3.txt").read_text()


def test_a_rank_that_moves_is_left_alone(tmp_path, clock):
    watchdog, ends = watch(tmp_path)
    with watchdog:
        for step in range(6):
            watchdog.moved(EVALUATION, step)
            clock.now += 0.15  # of 0.2
            clock.seen()
    assert not ends and not (tmp_path / "hang-3.txt").exists()


def test_start_up_and_checkpoints_have_limits_of_their_own(tmp_path, clock):
    for phase in (STARTUP, CHECKPOINT):
        watchdog, ends = watch(tmp_path)
        with watchdog:
            watchdog.moved(phase, 0)
            clock.now += 0.5  # more than a step's limit, and less than 0.6
            clock.seen()
            assert not ends
            clock.now += 0.2
            wait_for(lambda ends=ends: ends)


def test_a_limit_of_the_user_is_the_limit_and_another_grows_with_the_median_step():
    limits = Limits.from_config(GuardConfig(hang_timeout=300))
    assert limits.of(STEP, 60.0) == limits.of(EVALUATION, 60.0) == 300
    limits = Limits.from_config(GuardConfig())
    assert limits.of(STEP, 3.0) == limits.of(EVALUATION, 3.0) == 600
    assert limits.of(STEP, 60.0) == 1200
    assert limits.of(STARTUP, 60.0) == 1800
    assert Limits.from_config(GuardConfig(hang_timeout=0)) is None
    each = {"hang": STEP, "startup": STARTUP, "evaluation": EVALUATION, "checkpoint": CHECKPOINT}
    values = {f"{key}_timeout": number for number, key in enumerate(each, 1)}
    limits = Limits.from_config(GuardConfig(**values))
    assert [limits.of(phase, 60.0) for phase in each.values()] == [1, 2, 3, 4]


def test_one_long_step_does_not_raise_the_limit(tmp_path, clock):
    """Nor do the moments between the end of a step and that of its saves lower it."""
    watchdog, ends = watch(tmp_path, Limits(step=None, startup=1800.0, checkpoint=3900.0))
    watchdog.moved(STEP, 1)  # the first one compiles, and counts as start-up
    for step, seconds in enumerate((60, 500, *[60] * 30, 500, 60), 2):
        clock.now += seconds
        watchdog.moved(STEP, step)
        watchdog.moved(STEP, step)
    with watchdog:
        for _ in range(20):
            clock.now += 59.5  # of 20 steps of 60 s
            clock.seen()
        assert not ends
        clock.now += 20
        wait_for(lambda: ends)
    assert "(limit 1200 s, guard.hang_timeout)" in (tmp_path / "hang-3.txt").read_text()


def test_an_evaluation_may_have_a_limit_of_its_own(tmp_path):
    limits = Limits(step=60.0, startup=60.0, checkpoint=60.0, evaluation=0.2)
    assert limits.of(EVALUATION, 3.0) == 0.2 and limits.of(STEP, 3.0) == 60.0
    watchdog, ends = watch(tmp_path, limits)
    with watchdog:
        watchdog.moved(STEP, 4)
        watchdog.moved(EVALUATION, 4)
        wait_for(lambda: ends)
    assert "in its evaluation, after step 4" in (tmp_path / "hang-3.txt").read_text()


def test_an_evaluation_before_the_first_step_has_the_limit_of_start_up(tmp_path, clock):
    """It compiles and connects: with a step's limit every life would end in it again."""
    watchdog, ends = watch(tmp_path)
    with watchdog:
        watchdog.moved(EVALUATION, 4)
        clock.now += 0.5  # more than a step's limit, and less than 0.6
        clock.seen()
        assert not ends
        watchdog.moved(STEP, 5)
        watchdog.moved(EVALUATION, 5)
        clock.now += 0.5
        wait_for(lambda: ends)
    words = "(limit 0 s, guard.evaluation_timeout) in its evaluation, after step 5"
    assert words in (tmp_path / "hang-3.txt").read_text()


def test_the_recorder_of_nccl_is_asked_and_waited_for_only_so_long(tmp_path, monkeypatch):
    recorders = torch._C._distributed_c10d
    recorded = pickle.dumps({"entries": [], "version": "2.9", "pg_config": {}})
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(recorders, "_dump_nccl_trace", lambda: recorded, raising=False)
    monkeypatch.setattr(recorders, "_dump_fr_trace", lambda: time.sleep(60), raising=False)
    monkeypatch.setattr(watchdog_module, "RECORDER_S", 0.2)
    watchdog, ends = watch(tmp_path)
    with watchdog:
        watchdog.moved(STEP, 1)
        wait_for(lambda: ends)
    assert read_dump("hang-nccl-", str(tmp_path / "hang-nccl-3"))["rank"] == 3


def test_steps_are_noted_once_a_minute_and_the_last_one_at_the_end(tmp_path, clock):
    """A thousand ranks would replace their files at every look, for months."""
    noted = tmp_path / "phase-3.json"
    watchdog, ends = watch(tmp_path, Limits(step=120.0, startup=120.0, checkpoint=50.0))
    with watchdog:
        clock.seen()
        assert "start-up" in noted.read_text()
        for step, now, kept in ((1, 5, 1), (2, 20, 1), (3, 55, 1), (4, 66, 4), (5, 70, 4)):
            watchdog.moved(STEP, step)
            clock.now = now
            clock.seen()
            assert json.loads(noted.read_text()) == {"rank": 3, "phase": "step", "step": kept}
        watchdog.moved(CHECKPOINT, 5)
        clock.seen()
        assert "checkpoint" in noted.read_text()
        watchdog.moved(CHECKPOINT, 7)
        clock.now += 51
        wait_for(lambda: ends)
    assert json.loads(noted.read_text())["step"] == 7


def test_a_rank_that_others_end_has_noted_the_step_where_it_stands(tmp_path, clock):
    """It is ended a short limit after its last step, and is not to blame for being behind."""
    watchdog, _ = watch(tmp_path, Limits(step=20.0, startup=50.0, checkpoint=50.0))
    with watchdog:
        for step, now in ((1, 1), (2, 2), (2, 12)):
            watchdog.moved(STEP, step)
            clock.now = now
            clock.seen()
    assert json.loads((tmp_path / "phase-3.json").read_text())["step"] == 2


def test_a_limit_of_start_up_is_named_by_its_key(tmp_path, clock):
    watchdog, ends = watch(tmp_path)
    with watchdog:
        watchdog.moved(EVALUATION, 4)
        clock.now += 0.7
        wait_for(lambda: ends)
    assert "guard.startup_timeout" in (tmp_path / "hang-3.txt").read_text()


def test_without_limits_only_the_phase_is_kept(tmp_path):
    watchdog, ends = watch(tmp_path, limits=None)
    with watchdog:
        watchdog.moved(STEP, 1)
        time.sleep(0.4)
    assert not ends


def test_the_process_ends_with_the_code_although_its_main_thread_is_stuck(tmp_path):
    script = """
import sys, threading
from pathlib import Path
from pretrain.supervision.watchdog import Limits, STEP, Watchdog
with Watchdog(Path(sys.argv[1]), 0, Limits(0.2, 0.2, 0.2)) as watchdog:
    watchdog.moved(STEP, 1)
    threading.Event().wait()
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert child.returncode == ExitCode.HANG
    assert "no progress" in child.stderr and "hang-0.txt" in child.stderr


def test_watching_ends_with_the_run(tmp_path):
    before = threading.active_count()
    watchdog, _ = watch(tmp_path)
    with watchdog:
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_a_process_that_was_stopped_is_not_taken_for_one_that_hangs(tmp_path, clock):
    """Slurm suspends a job for another one; hours later all its threads go on."""
    watchdog, ends = watch(tmp_path)
    with watchdog:
        watchdog.moved(STEP, 1)
        clock.seen()
        clock.now += 3600
        clock.seen()
        assert not ends
        clock.now += 0.3
        wait_for(lambda: ends)


def test_progress_between_two_looks_is_not_taken_for_silence(tmp_path, clock):
    """The thread may be held up for minutes between its look at the clock and that at the rank."""
    watchdog, ends = watch(tmp_path)
    tells, late = clock.monotonic, [100.0]

    def hold_up():
        if threading.current_thread().name == "watchdog" and late:
            clock.now += late.pop()
            watchdog.moved(STEP, 1)
        return tells()

    clock.monotonic = hold_up
    with watchdog:
        wait_for(lambda: clock.looks > 3)
    assert not late and not ends
