"""Ranks meet within a limit; what is wrong is told by name, and a stop is heard meanwhile."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from pretrain.processes.environment import Place, read_place
from pretrain.processes.rendezvous import _missing, allow_connections, meet
from pretrain.processes.workers import free_port
from tests.clean_processes import CLEAN
from xlstm_io.errors import ConfigError, Interrupted, MachineFailed
from xlstm_io.signals import StopSignal

HERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def port():
    return free_port()


def test_without_a_launcher_there_is_one_process():
    assert read_place({}) is None
    place = read_place({"WORLD_SIZE": "8", "RANK": "7", **HERE})
    assert place == Place(7, 8, "127.0.0.1", 29500)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK='4' must be a whole number from 0 to 3, as WORLD"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK='-1' must be"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0' must be"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two' must be"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "70000"}, "MASTER_PORT='70000' must be"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set but RANK is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": ""}, "is set but MASTER_ADDR is not"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "no.such.host.invalid"},
            "MASTER_ADDR='no.such.host.invalid' cannot be resolved on",
        ),
    ],
)
def test_what_a_launcher_says_is_checked_first(variables, words):
    with pytest.raises(ConfigError) as caught:
        read_place(HERE | variables)
    assert words in str(caught.value)


def test_a_process_may_have_a_connection_to_every_other(monkeypatch):
    """Systems let it open 1,024 files at first, of which 1,024 ranks need more."""
    script = """
import resource
from pretrain.processes.rendezvous import allow_connections
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 2000))
allow_connections(1024)
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["2000", "2000"], done.stderr
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 1000))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: None)
    with pytest.raises(ConfigError, match=r"may have 1000 open files.*ulimit -Hn"):
        allow_connections(1024)


def in_threads(places, limit=20.0, stops=None, first=lambda number: None, stores=None):
    """What each rank gets: "store", or the error; `first` is what it does before."""
    found = [None] * len(places)
    stores = [] if stores is None else stores  # that of rank 0 must outlive the others' last look

    def one(number):
        first(number)
        try:
            stores.append(meet(places[number], limit, (stops or {}).get(number)))
            found[number] = "store"
        except (MachineFailed, Interrupted) as error:
            found[number] = error

    threads = [threading.Thread(target=one, args=(n,)) for n in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def places(port, *ranks, world):
    return [Place(rank, world, "127.0.0.1", port) for rank in ranks]


def test_all_ranks_meet(port):
    assert in_threads(places(port, 2, 0, 1, world=3)) == ["store"] * 3


@pytest.fixture
def agents_store(port, monkeypatch):
    """The store of a torchrun, which stays when it starts the processes again."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def test_each_start_by_the_same_torchrun_is_a_meeting_of_its_own(port, agents_store):
    """Nodes come and go, and the count of restarts stays as it is."""

    def first(number):
        if number == 0:  # the others have come when rank 0 opens the meeting
            time.sleep(0.3)

    stores = []
    for world in (2, 3, 3, 2):
        found = in_threads(places(port, *range(world), world=world), 20.0, None, first, stores)
        assert found == ["store"] * world
        assert not any(store.check(["mark"]) for store in stores[-world:]), "one of another start"
        stores[-1].set("mark", "")
        assert all(store.check(["mark"]) for store in stores[-world:])


def test_the_last_missing_rank_of_an_earlier_start_does_not_go_on_alone(port, agents_store):
    """Its node came back after the others had given up, or while they wait for a new meeting."""
    found = in_threads(places(port, 0, 1, world=3), limit=1.0)
    assert all("rank 2 of 3 had not come" in str(error) for error in found)
    (error,) = in_threads(places(port, 2, world=3), limit=1.0)
    assert isinstance(error, MachineFailed) and "rank 0 had not come" in str(error)
    assert in_threads(places(port, 2, 0, 1, world=3)) == ["store"] * 3


def test_missing_ranks_are_named_by_all_that_came(port):
    found = in_threads(places(port, 0, 3, world=8), limit=1.0)
    for rank, error in zip((0, 3), found, strict=True):
        assert isinstance(error, MachineFailed)
        assert f"rank {rank}: ranks 1 to 2, 4 to 7 of 8 had not come after 1 s" in str(error)
        assert "guard.rendezvous_timeout" in str(error)


def test_a_single_missing_rank_is_named():
    class Store:
        def check(self, keys):
            return keys != ["arrived/2"]

    assert _missing(Store(), Place(0, 4, "", 1)) == "rank 2 of 4"


def test_a_rank_0_that_never_comes_is_named(port):
    (error,) = in_threads(places(port, 1, world=2), limit=0.5)
    assert f"rank 1 could not reach rank 0 at 127.0.0.1:{port} for 0 s" in str(error)
    assert "Connection refused" in str(error)


def test_a_taken_port_is_named(port):
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        (error,) = in_threads(places(port, 0, world=2))
    assert isinstance(error, MachineFailed)
    assert f"MASTER_PORT={port} is taken on {socket.gethostname()}" in str(error)


def test_a_stop_is_heard_while_ranks_are_missing_and_ends_those_that_come_later(port):
    class Asked:
        """Asked as soon as rank 0 listens: before, the stopped rank would leave by itself."""

        @property
        def requested(self):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                return True
            return False

    started = time.monotonic()
    found = in_threads(places(port, 0, 1, world=3), stops={1: Asked()})
    assert [type(answer) for answer in found] == [Interrupted, Interrupted]
    assert time.monotonic() - started < 15


class AskedBefore:
    requested = True


@pytest.mark.parametrize("asked", [0, 1])
def test_a_rank_that_was_asked_alone_is_still_there_for_those_that_come_a_moment_later(port, asked):
    def come_later(number):
        if number != asked:
            time.sleep(0.5)

    found = in_threads(
        places(port, 0, 1, world=2), limit=30.0, stops={asked: AskedBefore()}, first=come_later
    )
    # Where all have come the training loop hears of it.
    expected = "store" if asked else Interrupted
    assert [a if a == "store" else type(a) for a in found] == [expected] * 2


def test_a_stop_after_all_have_come_is_left_to_the_training_loop(port):
    assert in_threads(places(port, 0, world=1), stops={0: AskedBefore()}) == ["store"]


def _wait_for_others(port, ready):
    with StopSignal(announce=False) as stop:
        ready.set()
        with contextlib.suppress(Interrupted):
            meet(Place(1, 2, "127.0.0.1", port), 60, stop)
            os._exit(1)
        os._exit(75)


def test_a_real_signal_ends_the_wait_for_rank_0(port):
    ready = CLEAN.Event()
    child = CLEAN.Process(target=_wait_for_others, args=(port, ready))
    child.start()
    assert ready.wait(120)
    os.kill(child.pid, signal.SIGTERM)
    child.join(120)
    assert child.exitcode == 75


def test_the_store_of_one_machine_listens_on_loopback_alone(port):
    """127.0.0.2 reaches what listens on all interfaces, and not what listens on 127.0.0.1."""
    store = meet(Place(0, 1, "127.0.0.1", port), 20.0)
    socket.create_connection(("127.0.0.1", port), 5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), 5)
    del store
