"""Stopping on request: one process with real signals, two processes that agree."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from pretrain.signals import REPEAT_WINDOW_S, STOP_SIGNALS, STOPPING, StopSignal, any_rank

LOOP = """
import sys, time
from pretrain.signals import StopSignal
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


def test_alone_a_process_agrees_with_itself():
    assert any_rank([False, True]) == [False, True]


def _two_ranks(rank: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    assert any_rank([False, False]) == [False, False]
    # one rank's request must reach all, and no other flag
    assert any_rank([rank == 1, False]) == [True, False]
    dist.destroy_process_group()


def test_ranks_agree_when_one_was_asked(tmp_path):
    mp.spawn(_two_ranks, args=(str(tmp_path / "store"),), nprocs=2)
