"""The story of a run on Slurm: its lives, why each ended, and what comes next."""

import json
import time
from pathlib import Path
from typing import Any

from slurm import scheduler
from slurm.job.state import SUMMARY_FILE, Life, RunState, State
from slurm.scheduler import QueuedJob
from xlstm_io.errors import UserError
from xlstm_io.terminal import say


def status(run: Path, *, as_json: bool = False) -> int:
    """Print the story of a run.

    The story is in the run's files, and Slurm adds what is queued. Its accounting is asked about
    one thing alone: a life that nobody saw end, because its batch script was killed too.

    Args:
        run: the run folder.
        as_json: as JSON, for programs.

    Raises:
        UserError: the run was never submitted.
    """
    files = RunState(run)
    state = files.load()
    if not state.job:
        raise UserError(f"{run} was never submitted; use python -m slurm submit train")
    job, unasked = None, ""
    try:
        job = scheduler.first_queued(state.jobs)
    except scheduler.SlurmError as error:
        unasked = str(error)
    facts = describe(files, state, job, unasked)
    say(json.dumps(facts, indent=1) if as_json else "\n".join(lines(facts)))
    return 0


def describe(
    files: RunState, state: State, job: QueuedJob | None, unasked: str = ""
) -> dict[str, Any]:
    """What is known about a run, as JSON values.

    Args:
        files: the run's.
        state: its state.
        job: the job that has the run now; None when none is queued.
        unasked: why Slurm could not be asked about the queue, or "".
    """
    progress = files.progress()
    cause, reason, until = "", "", None
    if state.lives and state.lives[-1].ended is None:
        cause, reason, until = _open_life(files, state.lives[-1], job, unasked)
    lives: list[dict[str, Any]] = []
    for life, following in zip(state.lives, [*state.lives[1:], None], strict=True):
        last = int(progress.get("step") or 0) if life.ended is None else life.last_step
        lost = max(0, last - following.start_step) if following else 0
        lives.append(
            {
                "life": life.number,
                "job": life.job,
                "nodes": list(life.nodes),
                "seconds": round((life.ended or until or time.time()) - life.began, 1),
                "from_step": life.start_step,
                "to_step": last,
                "repeated_steps": lost,
                "cause": life.cause or cause,
                "reason": life.reason or reason,
                "action": life.action,
            }
        )
    return {
        "run": str(files.run),
        "step": int(progress.get("step") or 0),
        "steps": progress.get("steps"),
        "checkpoint_step": progress.get("checkpoint_step"),
        "job": state.job,
        "queue": None if job is None else vars(job),
        "next": _next(files, state, job, unasked),
        "verdict": state.verdict,
        "excluded": state.excluded,
        "repeated_steps": sum(life["repeated_steps"] for life in lives),
        "goodput": goodput(state, progress, until),
        "lives": lives,
    }


def _open_life(
    files: RunState, life: Life, job: QueuedJob | None, unasked: str
) -> tuple[str, str, float | None]:
    """What is known of a life whose end is not written down.

    Returns:
        The cause, the reason, and when it ended; None while it may be at work.
    """
    end = None
    if unasked or (job is not None and job.job == life.job and job.state != "PENDING"):
        return "at work", "", None
    if job is not None and job.job == life.job:
        known = "the next life finds out why"
    else:
        state, end = scheduler.accounted_end(life.job)
        known = f"Slurm says {state}" if state else "Slurm has no record of it"
    return "not known", f"nobody saw it end; {known}", end or _last_sign(files, life)


def _last_sign(files: RunState, life: Life) -> float:
    """When a life wrote something for the last time."""
    paths = [files.run / "progress.json", *files.life_folder(life.number).glob("*")]
    return max([life.began, *(path.stat().st_mtime for path in paths if path.exists())])


def goodput(state: State, progress: dict[str, Any], until: float | None = None) -> float | None:
    """The share of the time since the first life that went into steps that count.

    Estimated as the steps done times the seconds of the last one; None before the first step.

    Args:
        state: of the run.
        progress: what its progress file says.
        until: when the last life ended that nobody saw end; None for now.
    """
    if not state.lives or not progress.get("step_seconds"):
        return None
    end = state.lives[-1].ended or until or time.time()
    passed = end - state.lives[0].began
    useful = float(progress["step"]) * float(progress["step_seconds"])
    return round(min(1.0, useful / passed), 4) if passed > 0 else None


def _next(files: RunState, state: State, job: QueuedJob | None, unasked: str) -> str:
    """What comes next, in a sentence."""
    resume = scheduler.command("resume", files.run)
    if job is not None and job.held:
        return f"job {job.job} was left held; {resume} releases it"
    if job is not None and job.state == "RUNNING":
        return f"job {job.job} runs"
    if job is not None:
        start = "" if job.start == "N/A" else f", expected to start at {job.start}"
        return f"job {job.job} is {job.state.lower()} ({job.reason}){start}"
    done = bool(state.lives) and state.lives[-1].action == "done"
    if done and (files.run / SUMMARY_FILE).exists():  # a rewind takes it away
        return "the run is finished"
    if state.verdict:
        return f"given up: {state.verdict}; after a cure, {resume}"
    if unasked:
        return f"whether a job is queued is not known: {unasked}"
    if files.stop_requested:
        return f"stopped on request; {resume} goes on"
    return f"no job is queued; {resume} goes on"


def lines(facts: dict[str, Any]) -> list[str]:
    """The story as text."""
    steps = f" of {facts['steps']}" if facts["steps"] else ""
    checkpoint = facts["checkpoint_step"]
    text = [
        f"{facts['run']}: step {facts['step']}{steps}, "
        + (f"checkpoint at step {checkpoint}" if checkpoint else "no checkpoint yet"),
        facts["next"],
    ]
    for node, why in sorted(facts["excluded"].items()):
        text.append(f"left out: {node} ({why})")
    if facts["lives"]:
        text.append("")
        text.append(
            f"{'life':>4} {'job':>8} {'nodes':>5} {'seconds':>8} {'steps':>15}  why it ended"
        )
    for life in facts["lives"]:
        steps = f"{life['from_step']}-{life['to_step']}"
        if life["repeated_steps"]:
            steps += f" (-{life['repeated_steps']})"
        why = life["reason"] or life["cause"]
        text.append(
            f"{life['life']:>4} {life['job']:>8} {len(life['nodes']):>5} {life['seconds']:>8.0f} "
            f"{steps:>15}  {why}"
        )
    if facts["lives"]:
        text.append("")
        text.append(f"steps repeated: {facts['repeated_steps']}")
    if facts["goodput"] is not None:
        text.append(f"goodput so far: {facts['goodput']:.1%} of the time since the first life")
    return text
