"""Who may write into a run folder: one life of the run at a time.

A *life* is one start of the training command in that folder. Lives are numbered from 1. A life
takes the lease before anything else happens. From then on every older life is superseded: it finds
out before it writes a manifest, deletes a checkpoint, rewrites the metrics or writes the summary,
and ends with exit code 76 without having touched anything.

    RUN/lives/000002.json   who took life 2; created exclusively and never changed
    RUN/lease.json          the holder's sign of life, replaced every `RENEW_S` seconds

The highest number is right. Clocks only decide how long a newcomer is refused; they never decide
who may write. A life that stood still between its check and its manifest can still complete a
checkpoint; `xlstm_io.checkpoint.lives` is what keeps that one from ever being loaded.
"""

import json
import os
import re
import shutil
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from xlstm_io.checkpoint.lives import Lives
from xlstm_io.errors import Superseded, UserError
from xlstm_io.holder import Holder, time_there, torchrun_id
from xlstm_io.new_file import create_new
from xlstm_io.storage import Location, absolute, read_file, write_atomic
from xlstm_io.terminal import tell

LEASE_FILE = "lease.json"
LIVES_FOLDER = "lives"
RECORD_BYTES = 1 << 20  # most that is read of a record
RENEW_S = 30.0
STALE_S = 300.0  # a holder on another machine that was silent for so long is taken to be gone
POLL_S = 5.0
_RECORD = re.compile(r"(\d{6,})\.json")


class LeaseHeldError(UserError):
    """Another life of the run is at work in this folder."""


class Lease:
    """The right to write into a run folder, held by rank 0 and renewed by a thread.

    Obtain one with `take`; use it as a context manager. Leaving it gives the lease back, so that
    the next life starts at once.

    Attributes:
        folder: the run folder.
        holder: this process.
        lost: whether the thread has seen that another life has the run; `check` says which.
    """

    def __init__(self, folder: Path, holder: Holder) -> None:
        self.folder, self.holder = folder, holder
        self.lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    @property
    def life(self) -> int:
        """Number of this life."""
        return self.holder.life

    @classmethod
    def take(cls, folder: Path, *, after: int = 0, take_over: bool = False) -> "Lease":
        """Take the lease of the run in `folder`, which is created if need be.

        Taken at once: when nobody holds it, when its holder gave it back, when the holder's process
        on this machine is gone, when the same Slurm job held it before it was requeued, and when
        the Slurm job that held it has ended. Otherwise after `STALE_S` seconds of silence, also
        when it was taken in another container of this machine, whose processes are not seen here.
        Where the same torchrun had started the holder, that is waited for: a node was lost, and the
        first rank is on another one now.

        Args:
            folder: the run folder.
            after: a number that the life's must be greater than; see `take_run`.
            take_over: take it from a holder that may be alive, which then ends with exit code 76.

        Raises:
            LeaseHeldError: another life holds it, or took it at this very moment.
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LIVES_FOLDER).mkdir(exist_ok=True)
        # The number is the next one after the life that was looked at, and no later one: of two
        # that start at once, the second finds it taken.
        newest = newest_life(folder) if take_over else _wait_for_own(folder)
        holder = Holder.here(max(newest, after) + 1)
        try:
            create_new(_record(folder, holder.life), json.dumps(asdict(holder)).encode())
        except FileExistsError:
            raise LeaseHeldError(
                f"run.dir={folder}: another process took life {holder.life} at this very moment; "
                "start one process per run folder, or use another run.dir"
            ) from None
        lease = cls(folder, holder)
        lease._sign("running")
        return lease

    def check(self) -> None:
        """Nothing while this is the newest life.

        Raises:
            Superseded: a newer life has the run, or another run has the folder; it names that life.
        """
        newest = self._successor()
        if newest:
            raise Superseded(
                f"{_who(self.folder, newest)} has taken over {self.folder} from life {self.life}, "
                "which ends here and deletes nothing"
            )

    def _successor(self) -> int:
        """Number of the life that has the folder in place of this one; 0 while none has."""
        newest = newest_life(self.folder)
        if newest > self.life:
            return newest
        # Somebody may have renamed the folder, and begun another run under its name: its lives are
        # numbered from 1. A folder that is gone is nobody's.
        record = _record(self.folder, self.life)
        ours = _holder(self.folder, self.life) in (self.holder, None)
        return newest if newest and not (ours and record.exists()) else 0

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError):  # the folder is full or gone: the end of the process says the same
            if not self._successor():
                self._sign("ended")

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            with suppress(OSError):  # a full disk; the training loop will say so itself
                if self._successor():
                    self.lost = True
                    return
                self._sign("running")

    def _sign(self, status: str) -> None:
        sign = {**asdict(self.holder), "status": status}
        write_atomic(self.folder / LEASE_FILE, json.dumps(sign).encode(), sync=False)


def take_run(
    folder: Path, checkpoints: Location, *, after: int = 0, take_over: bool = False
) -> Lease:
    """Take the lease of the run in `folder`, whose checkpoints may lie elsewhere.

    The number of the life is beyond those that are noted among the checkpoints. They may be of a
    run folder that is lost, or of another one that writes there, whose lease is looked at too where
    it can be seen from here.

    Args:
        folder: the run folder.
        checkpoints: the folder of its checkpoints.
        after: a number that the life's must be greater than.
        take_over: take it from a holder that may be alive, which then ends with exit code 76.

    Raises:
        LeaseHeldError: another life holds it, or is at work on the checkpoints.
        OSError: the run folder cannot be written, or the other one cannot be read.
    """
    # Looked at before the lease: who notes a number there later holds one that is seen here.
    lives = Lives(checkpoints)
    if not take_over and lives.run is not None and lives.run != absolute(folder):
        check_free(lives.run, checkpoints)
    return Lease.take(folder, after=max(after, lives.newest), take_over=take_over)


def next_life(folder: Path, checkpoints: Location) -> int:
    """The number that `take_run` would give the next life.

    Raises:
        OSError: one of the folders cannot be read.
    """
    return max(newest_life(folder), Lives(checkpoints).newest) + 1


def check_free(folder: Path, checkpoints: Location | None = None) -> int:
    """The newest life of the run in `folder`, when its lease can be taken now.

    Args:
        folder: the run folder.
        checkpoints: those that it shares with the run which starts; None where it is that run.

    Raises:
        LeaseHeldError: another life holds it.
    """
    newest = newest_life(folder)
    reason = _alive(folder, newest) if newest else None
    if reason is not None:
        key, used = "run.dir", f"run.dir={folder}"
        if checkpoints is not None:
            key, used = "checkpoint.dir", f"checkpoint.dir={checkpoints}, also that of {used},"
        raise LeaseHeldError(
            f"{used} is in use: {reason}; wait for its end, use another {key}, or take it over "
            "with --take-over, which ends the other one"
        )
    return newest


def began_by_same_torchrun(folder: Path) -> bool:
    """Whether the torchrun that started this process had started the newest life of a run too.

    torchrun starts the processes again when nodes come or go, with the same command line.
    """
    newest = newest_life(folder)
    holder = _holder(folder, newest) if newest else None
    return holder is not None and bool(holder.torchrun) and holder.torchrun == torchrun_id()


def _wait_for_own(folder: Path) -> int:
    """`check_free`, which waits for the silence of a life that the same torchrun had started."""
    end = time.monotonic() + STALE_S + RENEW_S
    told = False
    while True:
        try:
            return check_free(folder)
        except LeaseHeldError as error:
            if time.monotonic() > end or not began_by_same_torchrun(folder):
                raise
            if not told:
                tell(f"waiting, as torchrun has started the run again: {error}")
            told = True
        time.sleep(POLL_S)


def newest_life(folder: Path) -> int:
    """Number of the newest life that took the lease of a run folder; 0 when there was none."""
    try:
        names = os.listdir(folder / LIVES_FOLDER)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return max((int(match[1]) for name in names if (match := _RECORD.fullmatch(name))), default=0)


def _record(folder: Path, life: int) -> Path:
    return folder / LIVES_FOLDER / f"{life:06d}.json"


def _holder(folder: Path, life: int) -> Holder | None:
    """Who took a life; None when its record cannot be read."""
    try:
        return Holder(**json.loads(read_file(_record(folder, life), RECORD_BYTES, links=True)))
    except (OSError, ValueError, TypeError):
        return None


def _who(folder: Path, life: int) -> str:
    return str(_holder(folder, life) or f"life {life}")


def _alive(folder: Path, life: int) -> str | None:
    """Why the holder of a life may still be at work; None when it is gone."""
    holder = _holder(folder, life)
    try:
        sign = json.loads(read_file(folder / LEASE_FILE, RECORD_BYTES, links=True))
        if sign["life"] == life and sign["status"] == "ended":
            return None
    except (OSError, ValueError, KeyError, TypeError):
        pass  # it died before its first sign, or the file is damaged: the rest decides
    if holder is not None:
        here = Holder.here(life)
        if here.sees(holder):
            return f"{holder} is running" if holder.runs() else None
        if here.follows(holder) or (holder.job is not None and _job_has_ended(holder.job)):
            return None
    silent = _silence(folder, life)
    if silent >= STALE_S:
        return None
    return (
        f"{holder or f'life {life}'} gave its last sign of life {silent:.0f} s ago, and is taken "
        f"to be gone after {STALE_S:.0f} s"
    )


def _silence(folder: Path, life: int) -> float:
    """Seconds since the holder's last sign, by the clock of the file system alone."""
    now, signs = time_there(folder), []
    for path in (folder / LEASE_FILE, _record(folder, life)):
        with suppress(OSError):
            signs.append(path.stat().st_mtime)
    return now - max(signs, default=now)


def _job_has_ended(job: str) -> bool:
    """Whether Slurm says that a job is over; False where Slurm cannot be asked."""
    if shutil.which("squeue") is None:
        return False
    try:
        asked = subprocess.run(
            ["squeue", "--noheader", "--jobs", job, "--format=%T"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    # A job that has left the controller's memory is "Invalid job id specified".
    unknown = asked.returncode != 0 and "Invalid job id" in asked.stderr
    return unknown or (asked.returncode == 0 and not asked.stdout.strip())
