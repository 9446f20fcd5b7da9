"""How the ranks of a run meet: within a limit, ready to stop, and with the missing ones named.

torch's own rendezvous waits in C++, where no Python handler hears a signal, and says how many ranks
are missing, but not which. Here every rank registers in the store of rank 0 and looks there again
until all have come. One rank decides for all, by whoever is first to write the decision: to go on,
which is rank 0's alone, to stop because one was asked to, or to end because the time is over.

torchrun keeps its store when it starts the processes again, with all that earlier ones wrote. Its
count of restarts does not tell the starts apart: it stays as it is when nodes come or go, and each
torchrun counts for itself. So rank 0 opens every meeting under a name of its own, and a rank leaves
a meeting that cannot be its own: one for another number of ranks, one in which its number has been,
or one after which another was opened.
"""

import datetime
import errno
import ipaddress
import os
import resource
import secrets
import socket
import time
from contextlib import suppress

import torch.distributed as dist

from pretrain.processes.environment import Place
from xlstm_io.errors import ConfigError, Interrupted, MachineFailed, first_line
from xlstm_io.signals import StopSignal

POLL_S = 0.1
CONNECT_S = 5.0  # for one try to reach rank 0
LINGER_S = 5.0  # for the others to read a decision that ends rank 0, and the store with it
TELL_S = 5.0  # that a rank which was asked to stop still looks for rank 0, to tell the others
GO, STOP = "go", "stop"
OPEN = "meeting"  # key of the name of the newest meeting


def meet(place: Place, limit: float, stop: StopSignal | None = None) -> dist.Store:
    """Wait until all ranks of a run have come.

    Args:
        place: where this process stands.
        limit: seconds to wait.
        stop: the request to stop; None hears none.

    Returns:
        A store that all of them share.

    Raises:
        ConfigError: this process may not have a connection to each of them.
        MachineFailed: not all came in time, rank 0 cannot be reached, or its port is taken.
        Interrupted: a rank was asked to stop before all had come.
    """
    allow_connections(place.world_size)
    deadline = time.monotonic() + limit
    try:
        meeting = _Meeting(_connect(place, deadline, limit, stop), place)
        decision = _decide(meeting, deadline, stop)
    except dist.DistError as error:
        if stop is not None and stop.requested:
            raise Interrupted from None
        raise MachineFailed(
            f"rank {place.rank} lost rank 0 at {place.host}:{place.port} before all had come: "
            f"{first_line(error)}"
        ) from error
    if decision == GO:
        return meeting.store
    if decision == STOP:
        raise Interrupted
    raise MachineFailed(
        f"rank {place.rank}: {decision} had not come after {limit:.0f} s "
        "(guard.rendezvous_timeout); look at their output, and at their machines"
    )


def allow_connections(world_size: int) -> None:
    """Let this process open as many files as it may: a connection to another rank is one of them.

    gloo connects each rank with all others, for the saves and on CPUs for everything. Programs
    start with 1,024 files, whatever they may have, because of those that call `select`.

    Args:
        world_size: how many ranks there are.

    Raises:
        ConfigError: that is not enough.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS refuses "as many as you like"
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most != resource.RLIM_INFINITY and most < world_size:
        raise ConfigError(
            f"a process on {socket.gethostname()} may have {most} open files, and each of the "
            f"{world_size} processes of this run has a connection to every other; raise the hard "
            "limit (ulimit -Hn; Slurm takes it from the shell that submits)"
        )


def _connect(place: Place, deadline: float, limit: float, stop: StopSignal | None) -> dist.TCPStore:
    """The store of rank 0, or that of the torchrun that started this process."""
    hosts_it = place.rank == 0 and not _store_of_torchrun()
    if not hosts_it:
        _wait_for_rank_0(place, deadline, limit, stop)
    try:
        return dist.TCPStore(
            place.host,
            place.port,
            place.world_size,
            is_master=hosts_it,
            timeout=datetime.timedelta(seconds=max(CONNECT_S, limit)),
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=_loopback_listener(place) if hosts_it else None,
        )
    except (dist.DistError, OSError) as error:
        if "EADDRINUSE" not in str(error) and getattr(error, "errno", None) != errno.EADDRINUSE:
            raise
        raise MachineFailed(
            f"rank 0: MASTER_PORT={place.port} is taken on {socket.gethostname()}; if it stays "
            "taken, give another"
        ) from error


def _loopback_listener(place: Place) -> int | None:
    """A socket that only this machine reaches, where all ranks are on it; None elsewhere.

    torch's store listens on all interfaces and believes whoever connects.
    """
    if not ipaddress.ip_address(socket.gethostbyname(place.host)).is_loopback:
        return None
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((place.host, place.port))
        listener.listen(socket.SOMAXCONN)
        return listener.detach()


def _wait_for_rank_0(place: Place, deadline: float, limit: float, stop: StopSignal | None) -> None:
    """Until somebody listens at rank 0's address; in Python, which hears signals."""
    asked: float | None = None
    while True:
        try:
            socket.create_connection((place.host, place.port), CONNECT_S).close()
            return
        except OSError as error:
            if stop is not None and stop.requested:
                asked = asked or time.monotonic()
                if time.monotonic() - asked > TELL_S:
                    raise Interrupted from None
            if time.monotonic() > deadline:
                raise MachineFailed(
                    f"rank {place.rank} could not reach rank 0 at {place.host}:{place.port} for "
                    f"{limit:.0f} s (guard.rendezvous_timeout): {error.strerror or error}"
                ) from error
        time.sleep(POLL_S)


class _Meeting:
    """The meeting that this process has joined; see the top of this module.

    Args:
        store: that of rank 0, or of torchrun.
        place: where this process stands.

    Attributes:
        place: as given.
        store: of this meeting alone; that of another start before one is joined.
        come: how many have joined it; 0 before this process has.
    """

    def __init__(self, store: dist.Store, place: Place) -> None:
        self.place, self.store, self.come = place, store, 0
        self._all, self._name = store, ""
        if place.rank == 0:
            store.set(OPEN, f"{place.world_size}/{secrets.token_hex(8)}")
        self.look()

    def look(self) -> None:
        """Join the newest meeting, or see how many have joined."""
        name = self._name
        if not name or (_store_of_torchrun() and self.place.rank > 0):
            name = self._all.get(OPEN).decode() if self._all.check([OPEN]) else ""
        if name == self._name:
            self.come = self.store.add("come", 0) if self.come else 0
            return
        self._name, self.store = name, dist.PrefixStore(name, self._all)
        own = name.startswith(f"{self.place.world_size}/")
        own = own and self.store.add(f"arrived/{self.place.rank}", 1) == 1
        if _store_of_torchrun():  # else rank 0 lives on for those that come after its decision
            own = own and not self.store.check(["decision"])
        self.come = self.store.add("come", 1) if own else 0


def _decide(meeting: _Meeting, deadline: float, stop: StopSignal | None) -> str:
    """`GO`, `STOP`, or the ranks that are missing; the same on every rank that has come."""
    place = meeting.place
    asked: float | None = None
    while True:
        now = time.monotonic()
        if stop is not None and stop.requested:
            asked = asked or now
        wish = _wish(meeting, now > deadline, asked is not None)
        if meeting.come:
            if wish or meeting.store.check(["decision"]):  # another one was first
                break
        elif now > deadline:
            return "rank 0"
        elif asked is not None and now > asked + TELL_S:
            return STOP
        time.sleep(POLL_S)
        meeting.look()
    store = meeting.store
    decision = (store.compare_set("decision", "", wish) if wish else store.get("decision")).decode()
    read = store.add("read", 1)
    if decision != GO and place.rank == 0 and not _store_of_torchrun():
        end = time.monotonic() + LINGER_S
        # Nobody would tell of a stop those that come a moment later.
        awaited = place.world_size if decision == STOP else store.add("come", 0)
        while read < awaited and time.monotonic() < end:
            time.sleep(POLL_S)
            with suppress(dist.DistError):
                read = store.add("read", 0)
    return decision


def _wish(meeting: _Meeting, too_late: bool, asked: bool) -> str:
    """What this rank would decide; empty while it waits."""
    complete = meeting.come >= meeting.place.world_size
    if complete and meeting.place.rank == 0:
        return GO
    if asked and not complete:
        return STOP
    return _missing(meeting.store, meeting.place) if too_late else ""


def _missing(store: dist.Store, place: Place) -> str:
    """The ranks that have not come, in words: "ranks 3, 5 to 7 of 8"."""
    missing = [r for r in range(place.world_size) if not store.check([f"arrived/{r}"])]
    missing = missing or [0]  # that of an earlier start had come
    spans: list[list[int]] = []
    for rank in missing:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    names = ", ".join(f"{a} to {b}" if b > a else f"{a}" for a, b in spans)
    return f"rank{'s' if len(missing) > 1 else ''} {names} of {place.world_size}"


def _store_of_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
