"""The batch script's questions: how does a life begin, and what follows its end?

    python -m slurm.job.life begin   RUN --job J --restart R
    python -m slurm.job.life checked RUN --life N --interrupted ""
    python -m slurm.job.life end     RUN --life N --tries T
    python -m slurm.job.life follow  RUN --life N --job J --restart R --action A --wait S

The first three print shell assignments, which `batch.sh` evaluates. What is decided is written to
`state.json` and `story.jsonl` before anybody acts on it, so that the next life knows it whatever
happens in between.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from slurm import scheduler
from slurm.job.decide import Action, Cause, Decision, Evidence, decide
from slurm.job.follow import follow, say, submit_next
from slurm.job.health import judge_folder, notes_on_cluster
from slurm.job.state import Life, Policy, RunState, State, read_preflight
from xlstm_io.errors import ExitCode, UserError
from xlstm_io.rendezvous import rendezvous_port

# What the batch script ends with. Where nothing restarts the run, 75 keeps the job from looking
# complete; a requeued job's code is not shown.
EXIT_CODES = {
    Action.DONE: ExitCode.DONE,
    Action.LEAVE: ExitCode.DONE,
    Action.STOP: ExitCode.DONE,
    Action.REQUEUE: ExitCode.STOPPED,
    Action.FAIL: ExitCode.BUG,
}
CODES_OF_FAILURES = {
    Cause.BAD_INPUT: ExitCode.BAD_INPUT,
    Cause.DIVERGED: ExitCode.DIVERGED,
    Cause.HANG: ExitCode.HANG,
}


def begin(
    files: RunState, job: str, restart: int, nodes: Sequence[str], running: Sequence[str]
) -> dict[str, object]:
    """Start a life, or say why none starts.

    Args:
        files: the run's.
        job: this Slurm job.
        restart: how often Slurm has requeued it.
        nodes: of this life.
        running: the user's jobs that run now.

    Returns:
        What the batch script is told: `EXIT` and `REASON`; or `LIFE`, `LIFE_FOLDER`, `NODES`, the
        `HEAD` and the `PORT` where the ranks meet, and the `BURN` that the step id must reach.
    """
    policy, state = files.policy(), files.load()
    last = state.lives[-1] if state.lives else None
    if last and last.ended is None and last.job != job and last.job in running:
        return {"EXIT": 0, "REASON": f"job {last.job} is at work on this run"}
    if files.finished(policy.steps):
        return _none(files, f"all {policy.steps} steps are done")
    if last and last.ended is None:
        # Its batch script was ended too: a lost node, or Slurm's own requeue.
        state, decision = close(files, policy, state, last, tries=sys.maxsize)
        if decision.action is Action.FAIL:
            return _none(files, decision.reason)
    if files.stop_requested:
        return _none(files, "a stop was asked for; python -m slurm resume RUN goes on")
    if state.verdict:
        return _none(files, f"{state.verdict}; python -m slurm resume RUN tries again")
    number = _take_number(files, last.number + 1 if last else 1)
    life = Life(
        number=number,
        job=job,
        restart=restart,
        nodes=tuple(nodes),
        began=time.time(),
        start_step=files.newest_step(policy),
    )
    files.save(replace(state.with_life(life), job=job))
    files.tell("begin", f"life {number} on {' '.join(nodes)}", life=number, job=job)
    return {
        "LIFE": number,
        "LIFE_FOLDER": files.life_folder(number),
        "NODES": " ".join(nodes),
        "HEAD": nodes[0],
        "PORT": rendezvous_port(int(job), number),
        "BURN": step_id_to_reach(state, job, restart),
    }


def _none(files: RunState, reason: str) -> dict[str, object]:
    files.tell("none", reason)
    return {"EXIT": 0, "REASON": reason}


def _take_number(files: RunState, number: int) -> int:
    """The number of a new life, whose folder is created exclusively: no two lives share one."""
    files.folder.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            files.life_folder(number).mkdir()
            return number
        except FileExistsError:
            number += 1


def step_id_to_reach(state: State, job: str, restart: int) -> int:
    """The step id that this life has to use up before its training step; -1 for none.

    A requeued job counts its steps from 0 again. When a node that was cut off comes back, its old
    `srun` tells Slurm to end its step by number, and without this it would end the new life's.
    """
    used = [life.step_id for life in state.lives if life.job == job]
    return max([*used, restart - 1])


def end(files: RunState, number: int, tries: int) -> dict[str, object]:
    """Close a life.

    Args:
        files: the run's.
        number: of the life.
        tries: how many ports it has tried.

    Returns:
        What the batch script is told: `ACTION`, `REASON`, `EXIT`, the seconds to `WAIT`, and the
        next `PORT`.
    """
    policy, state = files.policy(), files.load()
    life = next(one for one in state.lives if one.number == number)
    if state.lives[-1].number > number:
        # Its node was cut off, and the job has gone on elsewhere: what this one says is out of
        # date, and a requeue by it would end the new life.
        return {"ACTION": Action.LEAVE, "REASON": "a newer life has the run", "EXIT": 0}
    state, decision = close(files, policy, state, life, tries)
    code = EXIT_CODES.get(decision.action, ExitCode.DONE)
    if decision.action is Action.FAIL:
        code = CODES_OF_FAILURES.get(decision.cause, code)
    return {
        "ACTION": decision.action,
        "REASON": decision.reason,
        "EXIT": int(code),
        "WAIT": decision.wait_s,
        "PORT": rendezvous_port(int(life.job), number + 1000 * tries),
    }


def checked(
    files: RunState, number: int, interrupted: bool, notes: Sequence[str] = ()
) -> dict[str, object]:
    """Judge the preflight of a life.

    Args:
        files: the run's.
        number: of the life.
        interrupted: whether Slurm has asked the job to end meanwhile.
        notes: what was found beside the nodes, in sentences.

    Returns:
        What the batch script is told: whether the nodes are `FIT`, "yes" or "".
    """
    life = next(one for one in files.load().lives if one.number == number)
    if interrupted:
        return {"FIT": ""}
    verdict = judge_folder(files.life_folder(number), life.nodes, notes)
    return {"FIT": "yes" if verdict.fit else ""}


def close(
    files: RunState, policy: Policy, state: State, life: Life, tries: int
) -> tuple[State, Decision]:
    """Decide what follows a life, and write it down.

    Args:
        files: the run's.
        policy: the limits.
        state: before.
        life: the one that ended.
        tries: how many ports it has tried.

    Returns:
        The state afterwards, and the decision.
    """
    records = files.records(life.number)
    progress = files.progress()
    life = replace(
        life,
        checkpoint_step=files.newest_step(policy),
        last_step=int(progress.get("step") or 0),
        step_id=max([life.step_id, *(record.step_id for record in records)]),
        ended=time.time(),
    )
    bad_nodes, unfit = read_preflight(files.life_folder(life.number))
    evidence = Evidence(
        records,
        finished=files.finished(policy.steps),
        stop_requested=files.stop_requested,
        bad_nodes=bad_nodes,
        unfit=unfit,
        tries=tries,
        slow_nodes=[str(node) for node in progress.get("stragglers") or ()],
    )
    past = [one for one in state.lives if one.number < life.number]
    decision = decide(life, evidence, past, policy, tuple(state.excluded), state.since)
    if decision.action is Action.RETRY:
        _set_records_aside(files.life_folder(life.number), tries)
        life = replace(life, ended=None)
    else:
        life = replace(
            life,
            cause=str(decision.cause),
            reason=decision.reason,
            node=decision.node,
            last_line=decision.last_line,
            action=str(decision.action),
        )
    verdict = decision.reason if decision.action is Action.FAIL else ""
    state = replace(
        state.with_life(life), excluded=state.excluded | dict(decision.exclude), verdict=verdict
    )
    files.save(state)
    files.tell(
        str(decision.action),
        f"life {life.number}: {decision.reason}",
        life=life.number,
        job=life.job,
        step=life.checkpoint_step,
        left_out=[node for node, _ in decision.exclude],
    )
    return state, decision


def _set_records_aside(folder: Path, tries: int) -> None:
    """Keep the records of a start on a port that was taken, out of the way of the next start."""
    old = folder / f"try-{tries}"
    old.mkdir(exist_ok=True)
    for path in [*folder.glob("rank-*.json"), *folder.glob("rank-*.log")]:
        path.rename(old / path.name)


def shell(values: dict[str, object]) -> str:
    """Assignments of `XLSTM_...` variables that a shell can evaluate."""
    return "\n".join(f"XLSTM_{name}={shlex.quote(str(text))}" for name, text in values.items())


def _begin(files: RunState, job: str, restart: int) -> dict[str, object]:
    """`begin`, with what Slurm knows; in a chain the next job is submitted too.

    Where the run stops in time by itself, `JOB_END` says when, in seconds since 1970.
    """
    nodes = scheduler.nodes_of_job()  # without the names every node would be a world of its own
    told = begin(files, job, restart, nodes, scheduler.running_jobs())
    if "LIFE" not in told:
        say(f"nothing to do: {told.pop('REASON')}")
        return told
    say(f"life {told['LIFE']} on {told['NODES']}")
    policy = files.policy()
    if policy.stops_in_time:
        told["JOB_END"] = scheduler.end_of(job) or ""
    if policy.mode == "chain":
        # It waits from now on, so that it is there whatever ends this one.
        submit_next(files, "--dependency=singleton")
    return told


def main(words: Sequence[str]) -> int:
    """The command line that `batch.sh` calls."""
    parser = argparse.ArgumentParser(prog="python -m slurm.job.life", description=__doc__)
    parser.add_argument("event", choices=("begin", "checked", "end", "follow"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--job", default="")
    parser.add_argument("--restart", type=int, default=0)
    parser.add_argument("--life", type=int, default=0)
    parser.add_argument("--interrupted", type=bool, default=False)  # any text but the empty one
    parser.add_argument("--tries", type=int, default=1)
    parser.add_argument("--action", default="")
    parser.add_argument("--wait", type=int, default=0)
    options = parser.parse_args(words)
    files, life = RunState(options.run), options.life
    told: dict[str, object] = {}
    if options.event == "begin":
        told = _begin(files, options.job, options.restart)
    elif options.event == "checked":
        notes = notes_on_cluster(files.run)
        told = checked(files, life, options.interrupted, notes)
        for note in notes:
            say(f"note: {note}")
    elif options.event == "end":
        told = end(files, life, options.tries)
        say(f"{told['ACTION']}: {told.pop('REASON')}")
    else:
        follow(
            files,
            options.job,
            options.restart,
            life=life,
            action=options.action,
            wait_s=options.wait,
            interrupted=options.interrupted,
        )
    print(shell(told))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, OSError) as error:  # also a full disk
        sys.exit(f"error: {error}")
