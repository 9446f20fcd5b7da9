"""Stopping on request: one process with real signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xlstm_io.errors import ExitCode, Interrupted
from xlstm_io.signals import (
    REPEAT_WINDOW_S,
    STOP_SIGNALS,
    STOPPING,
    StopSignal,
    install,
    restore,
    stop_signals_blocked,
    stop_signals_raise,
)

LOOP = """
import sys, time
from xlstm_io.signals import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    limit = time.monotonic() + 30  # a failing test leaves nothing behind for long
    while not stop.requested and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep({saving})
sys.exit(75)
"""


def start(saving: float = 0.0) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP.format(saving=saving)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_lets_the_step_end(number):
    process = start()
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 75
    assert errors.count(STOPPING) == 1


def test_copies_of_one_ctrl_c_are_one_request():
    process = start(saving=REPEAT_WINDOW_S * 2)
    for _ in range(4):
        process.send_signal(signal.SIGINT)
        time.sleep(0.03)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 75
    assert errors.count(STOPPING) == 1


def test_a_second_ctrl_c_stops_at_once():
    process = start(saving=30)
    process.send_signal(signal.SIGINT)
    time.sleep(REPEAT_WINDOW_S + 0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 130


def test_repeated_sigterm_never_interrupts_a_checkpoint():
    process = start(saving=REPEAT_WINDOW_S + 0.6)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(REPEAT_WINDOW_S + 0.1)
    process.communicate(timeout=10)
    assert process.returncode == 75


def test_ctrl_c_after_sigterm_is_a_first_press():
    process = start(saving=REPEAT_WINDOW_S + 0.6)
    process.send_signal(signal.SIGTERM)
    time.sleep(REPEAT_WINDOW_S + 0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 75


def test_a_time_limit_is_a_request():
    with StopSignal(announce=False) as stop:
        assert not stop.requested
        stop.end_after(60)
        assert not stop.requested and stop.reason == "on request"
        stop.end_after(time.monotonic() - stop.started)
        assert stop.requested and stop.reason == "its time is over"
        stop.end_after(60)
        assert stop.requested, "the earliest counts"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "on request", "what a person or a scheduler asks for comes first"


def test_a_time_of_day_is_a_time_limit():
    with StopSignal(announce=False) as stop:
        stop.end_at(time.time() + 60)
        assert not stop.requested
        stop.end_at(time.time() - 1)
        assert stop.requested and stop.reason == "its time is over"


# The parent of a worker, as torchrun is one. It starts the worker and is killed.
TORCHRUN = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(60)
"""
WORKER = """
import signal, time
from pathlib import Path
from xlstm_io.signals import StopSignal, signal_at_parents_death
with StopSignal(announce=False) as stop:
    signal_at_parents_death(signal.SIGTERM)
    Path("ready").touch()
    limit = time.monotonic() + 30
    while not stop.requested and time.monotonic() < limit:
        time.sleep(0.01)
Path("stopped" if stop.requested else "alone").touch()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_a_worker_whose_parent_was_killed_is_asked_to_stop(tmp_path):
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", TORCHRUN, WORKER],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    for name, action in (("ready", parent.kill), ("stopped", parent.wait)):
        limit = time.monotonic() + 20
        while not (tmp_path / name).exists():
            assert time.monotonic() < limit, name
            time.sleep(0.01)
        action()


def test_nohup_stays_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal(announce=False) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_come_back_and_quiet_ranks_are_quiet(capfd):
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignal(announce=False) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested
    assert signal.getsignal(signal.SIGUSR1) is before
    assert capfd.readouterr().err == ""


WITHOUT_CTRL_C = [number for number in STOP_SIGNALS if number != signal.SIGINT]


@pytest.mark.parametrize("number", WITHOUT_CTRL_C)
def test_work_that_can_be_cut_is_cut(number):
    """Even where the code that runs takes every `Exception` for a failure of its own."""
    with pytest.raises(Interrupted), stop_signals_raise():
        try:
            os.kill(os.getpid(), number)
        except Exception as error:
            raise AssertionError from error


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_what_is_ignored_stays_ignored_and_handlers_come_back(number):
    before = signal.signal(number, signal.SIG_IGN)
    calls = []
    try:
        previous = install(lambda number, frame: calls.append(number))
        os.kill(os.getpid(), number)
        assert not calls and number not in previous
        others = [other for other in previous if other != signal.SIGKILL]
        os.kill(os.getpid(), others[0])
        assert calls == [others[0]]
        restore(previous)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_signals_wait_while_processes_start():
    code = (
        "import signal; from xlstm_io.signals import STOP_SIGNALS\n"
        "print(set(STOP_SIGNALS) <= signal.pthread_sigmask(signal.SIG_BLOCK, ()))"
    )
    with StopSignal(announce=False) as stop:
        with stop_signals_blocked():
            signal.raise_signal(signal.SIGTERM)  # to this thread; another one would take it
            inherited = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            )
            assert not stop.requested
        assert stop.requested, "it was kept, not lost"
    assert inherited.stdout == "True\n"


PREPARE = """
import os, sys
from data_prep import cli
def work(self):
    print("ready", flush=True)
    sys.stdin.readline()
cli.Verify.run = work
sys.exit(cli.main(["verify", "folder"]))
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_data_preparation_stops_at_every_stop_signal(number):
    with subprocess.Popen(
        [sys.executable, "-c", PREPARE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == ExitCode.STOPPED
    assert "run it again to continue" in errors and "Traceback" not in errors
