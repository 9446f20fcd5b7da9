"""What is asked of Slurm's own commands, once per call and never in a loop.

By the commands of `python -m slurm`, and by a job's batch script, whose Python has the standard
library alone.
"""

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from xlstm_io.errors import UserError

TIMEOUT_S = 60
RETRY_S = 15.0

# What the tools say where no controller answers, where this machine knows none, and where the
# controller does not believe them.
_SILENT = re.compile(
    r"unable to contact slurm controller|connection (?:refused|timed out|reset)|no route to host"
    r"|(?:socket|communication) timed out|zero bytes were transmitted|connect failure"
    r"|controller .*not respond|in standby mode",
    re.I,
)
# What they say where the request may have arrived, and the answer was lost.
_LOST_ANSWER = re.compile(
    r"(?:socket|communication) timed out|zero bytes|connection (?:reset|timed out after)", re.I
)
_UNKNOWN = re.compile(r"configuration source|DNS SRV|unable to process configuration file", re.I)
_NOT_BELIEVED = re.compile(r"munge|authentication", re.I)


class SlurmError(UserError):
    """Slurm refuses something, or cannot be asked; the message has its own words."""


class NoAnswerError(SlurmError):
    """Slurm's controller does not answer now."""


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue.

    Attributes:
        job: its number.
        state: as Slurm says it, such as RUNNING.
        reason: why it waits.
        start: when Slurm expects it to start, or "N/A".
    """

    job: str
    state: str
    reason: str
    start: str

    @property
    def held(self) -> bool:
        """Whether it waits for `scontrol release`."""
        return self.state != "RUNNING" and "held" in self.reason.lower()


def ask(*words: str) -> str:
    """The output of one of Slurm's commands.

    Raises:
        SlurmError: it is not on this machine, does not answer, or refuses; in its own words.
    """
    end = time.monotonic() + _patience_s
    while True:
        try:
            return _succeeded(words, _run(*words))
        except NoAnswerError as error:
            # The job may be there: a second one would start together with it.
            may_be_there = words[0] == "sbatch" and _LOST_ANSWER.search(str(error))
            if may_be_there or time.monotonic() + RETRY_S > end:
                raise
            time.sleep(RETRY_S)


_patience_s = 0.0


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """A block in which `ask` repeats for so long what no controller answers."""
    global _patience_s
    _patience_s = seconds
    try:
        yield
    finally:
        _patience_s = 0.0


def _succeeded(words: Sequence[str], done: subprocess.CompletedProcess[str]) -> str:
    """What a command printed.

    Raises:
        SlurmError: it failed.
    """
    if done.returncode == 0:
        return done.stdout.strip()
    raise _failure(words, (done.stderr or done.stdout).strip() or f"exit code {done.returncode}")


def _failure(words: Sequence[str], said: str) -> SlurmError:
    """What it means that a command failed, and what helps.

    Args:
        words: the command.
        said: its own words.
    """
    tool = words[0]
    if _SILENT.search(said):
        remedy = "repeat this in some minutes; `scontrol ping` says whether it is back"
        if tool == "sbatch" and "--test-only" not in words:
            remedy = f"look with `squeue --me` whether the job is there before you {remedy}"
        return NoAnswerError(
            f"{tool} failed, since Slurm's controller does not answer: {said}; jobs that run go on "
            f"without it; {remedy}"
        )
    if _UNKNOWN.search(said):
        return SlurmError(
            f"{tool} failed, since this machine does not know where Slurm's controller is: {said}; "
            "run this where jobs are submitted, or set SLURM_CONF"
        )
    if _NOT_BELIEVED.search(said):
        return SlurmError(
            f"{tool} failed, since Slurm's controller does not believe who asks: {said}; try "
            "another login node, and tell your admin (munge, clocks)"
        )
    if "--test-only" in words:
        return SlurmError(f"Slurm refuses {words[-1]}: {said}")
    return SlurmError(f"{tool}: {said}")


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(words[0]) is None:
        raise SlurmError(
            f"{words[0]} is not on this machine; run this where jobs are submitted, or use "
            "python -m slurm render, which needs no Slurm"
        )
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise _failure(words, f"connection timed out after {TIMEOUT_S} s") from None


def test_only(file: Path, options: Iterable[str]) -> str:
    """When Slurm would start a job; SlurmError with its words where it would refuse the job."""
    words = ("sbatch", "--test-only", *options, str(file))
    done = _run(*words)
    said = (done.stderr + done.stdout).strip()
    if done.returncode != 0:
        raise _failure(words, said)
    return said.removeprefix("sbatch: ")


def submit(file: Path, options: Iterable[str]) -> str:
    """Submit a file; the number of the job."""
    return ask("sbatch", "--parsable", *options, str(file)).split(";")[0]


def first_queued(jobs: Sequence[str]) -> QueuedJob | None:
    """The first of several jobs that is in the queue; None when none is."""
    if not jobs:
        return None
    words = ("squeue", "--noheader", f"--jobs={','.join(jobs)}", "--format=%A|%T|%r|%S")
    done = _run(*words)
    if done.returncode != 0 and "Invalid job id" in done.stderr:
        return None
    found = [QueuedJob(*line.split("|", 3)) for line in _succeeded(words, done).splitlines()]
    return min(found, key=lambda one: jobs.index(one.job), default=None)


def accounted_end(job: str) -> tuple[str, float | None]:
    """How a job that has left the queue ended, as Slurm's accounting says it.

    Args:
        job: its number.

    Returns:
        The state, such as NODE_FAIL, and the time in seconds since 1970. Many clusters have no
        accounting: then "" and None.
    """
    words = ("--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=State,End")
    try:
        state, _, end = ask("sacct", *words).rpartition("\n")[2].partition("|")
    except SlurmError:
        return "", None
    return state, _moment(end)


def end_of(job: str) -> float | None:
    """When a running job meets its time limit, in seconds since 1970; None where there is none.

    Newer versions of Slurm tell the job in SLURM_JOB_END_TIME, and 22.05 does not.
    """
    try:
        return _moment(ask("squeue", "--noheader", f"--jobs={job}", "--format=%e"))
    except SlurmError:
        return None


def _moment(text: str) -> float | None:
    """One of Slurm's times in seconds since 1970; None for NONE, Unknown and the like."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def running_jobs() -> list[str]:
    """Numbers of this user's jobs that run; empty where Slurm does not say."""
    user = f"--user={os.getuid()}"
    try:
        return ask("squeue", "--noheader", user, "--states=RUNNING", "--format=%A").split()
    except SlurmError:
        return []


def nodes_of_job() -> list[str]:
    """Names of the nodes of the job that this process is in."""
    return ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()


def all_nodes() -> list[str]:
    """Names of all nodes of the cluster."""
    return sorted(set(ask("sinfo", "--noheader", "--Node", "--format=%N").split()))


def known_nodes(partition: str) -> list[str]:
    """Names of the nodes of a partition; empty when there is no such partition."""
    found = ask("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N")
    return sorted(set(found.split()))


def known_of(excluded: Iterable[str], known: Iterable[str]) -> list[str]:
    """The nodes of a list that this cluster knows: one unknown name and Slurm refuses them all."""
    return sorted(set(excluded) & set(known))


def exclude_option(excluded: Iterable[str], known: Iterable[str]) -> list[str]:
    """`--exclude` with the nodes to leave out; nothing where there are none."""
    names = known_of(excluded, known)
    return [f"--exclude={','.join(names)}"] if names else []


def gpus_of_nodes(partition: str) -> int:
    """The most GPUs that a node of a partition has."""
    told = ask("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%G")
    counts = [0]
    for line in told.splitlines():
        counts.append(sum(int(n) for n in re.findall(r"gpu:(?:[^:,()]+:)?(\d+)", line)))
    return max(counts)


def facts(partition: str) -> dict[str, str]:
    """What the configuration says about restarts: KillWait, GraceTime and the like."""
    wanted = ("KillWait", "SlurmdTimeout", "JobRequeue", "PreemptMode", "MaxArraySize")
    told = dict(re.findall(r"(?m)^(\w+)\s*= (.*?)\s*$", ask("scontrol", "show", "config")))
    found = {name: told.get(name, "unknown") for name in wanted}
    of_partition = ask("scontrol", "--oneliner", "show", "partition", partition)
    for name in ("GraceTime", "PreemptMode"):
        match = re.search(rf"\b{name}=(\S+)", of_partition)
        if match:
            found[name] = match[1]
    return found


def too_late_to_save(save_s: float | None, facts: Mapping[str, str]) -> list[str]:
    """Which ends of a job leave a run too little time to save, in a sentence.

    Args:
        save_s: seconds of the last save; None before the first.
        facts: of the cluster.
    """
    kill_wait = seconds_of(facts["KillWait"])
    grace = seconds_of(facts.get("GraceTime", ""))
    if save_s is None or save_s <= kill_wait:
        return []
    ends = ["`scontrol requeue`"]
    if "OFF" not in facts["PreemptMode"] and save_s > kill_wait + grace:
        ends.append("a preemption")
    return [
        f"a save takes {save_s:.0f} s; KillWait is {kill_wait} s and GraceTime {grace} s, so that "
        f"{' or '.join(ends)} loses the steps since the last checkpoint"
    ]


def command(name: str, run: Path) -> str:
    """A command of this package on a run, as it can be pasted into a shell."""
    return f"python -m slurm {name} {shlex.quote(str(run))}"


def facts_line(facts: Mapping[str, str]) -> str:
    """The facts of a cluster in one line."""
    return ", ".join(f"{name}={value}" for name, value in facts.items())


def seconds_of(value: str) -> int:
    """The number in a value such as `30 sec`; 0 when there is none."""
    match = re.match(r"\d+", value)
    return int(match[0]) if match else 0
