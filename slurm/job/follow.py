"""What follows a life in Slurm: the same job again, a new one, or nothing.

The batch script asks this on its host, outside of any container, where Slurm's commands are. It
does so with SIGTERM ignored: `requeuehold` ends the batch script, and there are KillWait seconds
for what comes after it.
"""

import re
import sys
import time
from dataclasses import replace

from slurm import scheduler
from slurm.job.decide import Action
from slurm.job.state import BATCH_FILE, RunState

PATIENCE_S = 600.0  # a controller that restarts, or hands over to its backup, is back by then


def say(text: str) -> None:
    """Print a line to the output of the job, where the standard error goes too."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} xlstm: {text}", file=sys.stderr, flush=True)


@scheduler.patience(PATIENCE_S)
def follow(
    files: RunState,
    job: str,
    restart: int,
    *,
    life: int,
    action: str,
    wait_s: int,
    interrupted: bool,
) -> None:
    """Let Slurm do what was decided at the end of a life, as soon as it answers.

    Args:
        files: the run's.
        job: this Slurm job.
        restart: how often Slurm has requeued it.
        life: the number of the life.
        action: what was decided, one of `slurm.job.decide.Action`.
        wait_s: how long the next life waits.
        interrupted: whether Slurm is ending the job.

    Raises:
        SlurmError: Slurm does not say what became of the job.
    """
    last = files.load().job
    successor = last if last != job else ""  # in a chain the next job waits already
    if action == Action.REQUEUE and interrupted:
        if _restarts(job) != restart:
            say("Slurm has requeued the job itself")
            return
        if _was_cancelled(files, job, life):
            say("the job was cancelled; python -m slurm resume goes on")
            action = Action.STOP
    if action == Action.REQUEUE:
        _start_again(files, job, successor, wait_s)
    elif successor:
        # By its number, never by its name, which other jobs may have too.
        _try("scancel", successor)


def _start_again(files: RunState, job: str, successor: str, wait_s: int) -> None:
    """Let the next life begin: in the job that waits, in this one, or in a new one."""
    excluded = scheduler.known_of(files.load().excluded, scheduler.all_nodes())
    changes = [f"ExcNodeList={','.join(excluded)}"] if excluded else []
    changes += [f"StartTime=now+{wait_s}"] if wait_s else []
    if successor:
        if changes:
            _try("scontrol", "update", f"JobId={successor}", *changes)
        return
    if files.policy().mode == "never":
        return
    try:
        scheduler.ask("scontrol", "requeuehold" if changes else "requeue", job)
    except scheduler.SlurmError as error:
        # The site does not allow it: a new job, which waits for the end of this one.
        say(f"no requeue: {error}")
        submit_next(files, f"--dependency=afterany:{job}", f"--begin=now+{wait_s}")
        return
    if changes:
        # A running job's list of excluded nodes cannot be changed; that of a held one can.
        _try("scontrol", "update", f"JobId={job}", *changes)
        _try("scontrol", "release", job)


def submit_next(files: RunState, *options: str) -> None:
    """Submit the run's file again, and note the number of the job."""
    try:
        excluded = scheduler.exclude_option(files.load().excluded, scheduler.all_nodes())
        job = scheduler.submit(files.folder / BATCH_FILE, [*excluded, *options])
    except scheduler.SlurmError as error:
        say(f"no next job: {error}")
        return
    files.save(replace(files.load(), job=job))
    files.tell("submit", f"job {job}, by the job before it", job=job)
    say(f"the next job is {job}")


def _try(*words: str) -> None:
    """Run one of Slurm's commands; where Slurm refuses, say so and go on."""
    try:
        scheduler.ask(*words)
    except scheduler.SlurmError as error:
        say(str(error))


def _restarts(job: str) -> int:
    """How often Slurm has requeued a job until now."""
    told = scheduler.ask("scontrol", "--oneliner", "show", "job", job)
    found = re.search(r"\bRestarts=(\d+)", told)
    return int(found[1]) if found else 0


def _was_cancelled(files: RunState, job: str, life: int) -> bool:
    """Whether Slurm ends the job because somebody cancelled it.

    Only its output tells a time limit or a preemption from that, and the lives before this one have
    left theirs in the same file.
    """
    try:
        text = (files.folder / f"{job}.out").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    own = text.rpartition(f"xlstm: life {life} on ")[2]
    return not re.search(rf"JOB {job} ON .* DUE TO", own)
