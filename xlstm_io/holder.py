"""Who holds something: a process, told apart from all others on any machine.

Of a process on another machine, or in another container of this one, nothing is seen. Its sign of
life is a file that it changes; how long ago that was is asked of the file system's own clock.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Holder:
    """A process that holds something.

    Attributes:
        life: number of the life of a run that it is; 0 where it is none.
        host: name of the machine.
        boot: identifies the machine's start, so that a process number is never mistaken after one.
        pid: process number.
        started: when the process started, in clock ticks since the boot (field 22 of
            `/proc/PID/stat`); 0 where the system does not tell.
        job: Slurm job, or None.
        restart: how often Slurm had requeued that job.
        namespace: where the process number holds; a container may have its own on the same machine.
        torchrun: the identity of the torchrun that started it (`--rdzv-id`), or "".
    """

    life: int
    host: str
    boot: str
    pid: int
    started: int
    job: str | None
    restart: int
    namespace: str
    torchrun: str = ""

    @classmethod
    def here(cls, life: int = 0) -> "Holder":
        """This process."""
        return cls(
            life=life,
            host=socket.gethostname(),
            boot=_boot(),
            pid=os.getpid(),
            started=started(os.getpid()),
            job=os.environ.get("SLURM_JOB_ID"),
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            namespace=_namespace(),
            torchrun=torchrun_id(),
        )

    def sees(self, other: "Holder") -> bool:
        """Whether the process numbers of both are of one machine, its start and its namespace."""
        place = (self.host, self.boot, self.namespace)
        return place == (other.host, other.boot, other.namespace)

    def follows(self, other: "Holder") -> bool:
        """Whether this is the same Slurm job, requeued since then; a second step of it is not."""
        return other.job is not None and other.job == self.job and other.restart < self.restart

    def runs(self) -> bool:
        """Whether the process is there; asked by one who sees it."""
        return bool(self.started) and started(self.pid) == self.started

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"life {self.life} (process {self.pid} on {self.host}{job})"


def time_there(folder: Path) -> float:
    """The time by the clock of the file system of a folder, in seconds since 1970.

    Raises:
        OSError: nothing can be written there.
    """
    probe = folder / f".clock.{socket.gethostname()}.{os.getpid()}"
    probe.write_bytes(b"")
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def torchrun_id() -> str:
    """The identity of the torchrun that started this process; "" where it has none of its own."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if name == "none" else name  # what torchrun says without --rdzv-id


def started(pid: int) -> int:
    """When a process started (clock ticks since the boot); 0 when there is none of that number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    state, *fields = stat.rpartition(")")[2].split()
    return 0 if state in "ZX" else int(fields[18])
