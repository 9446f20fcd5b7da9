"""Stop a run, and let it go on."""

from pathlib import Path

from slurm import scheduler
from slurm.job.state import STOP_FILE, RunState
from slurm.submit import check_not_held, forgive, resubmit
from xlstm_io.errors import UserError


def stop(run: Path, *, now: bool = False) -> int:
    """Let a run save and stop, and not start again by itself.

    Args:
        run: the run folder.
        now: cancel the job at once; what was done since the last checkpoint is lost.

    Raises:
        UserError: no job has the run.
    """
    files = RunState(run)
    state = files.load()
    job = scheduler.first_queued(state.jobs)
    if job is None:
        raise UserError(f"no job has the run {run}; there is nothing to stop")
    (files.folder / STOP_FILE).touch()
    if now or job.state != "RUNNING":
        scheduler.ask("scancel", job.job)
        files.tell("stop", f"job {job.job} was cancelled", job=job.job)
        print(f"cancelled job {job.job} ({job.state})")
        return 0
    scheduler.ask("scancel", "--signal=USR1", job.job)
    files.tell("stop", f"job {job.job} was asked to save and stop", job=job.job)
    print(f"job {job.job} saves and stops; {scheduler.command('resume', run)} goes on")
    return 0


def resume(run: Path) -> int:
    """Let a run go on: release its held job, or submit its files again.

    Raises:
        UserError: the run is finished, or a job has it, or Slurm refuses.
    """
    files = RunState(run)
    state = files.load()
    if not state.job:
        raise UserError(f"{run} was never submitted; use python -m slurm submit train")
    job = scheduler.first_queued(state.jobs)
    if job is not None and job.held:
        forgive(files, job.job)
        scheduler.ask("scontrol", "release", job.job)
        files.tell("resume", f"job {job.job} was released", job=job.job)
        print(f"released job {job.job}")
        return 0
    if files.finished(files.policy().steps):
        raise UserError(f"{run} is finished; there is nothing to resume")
    check_not_held(files)
    print(resubmit(files))
    return 0
