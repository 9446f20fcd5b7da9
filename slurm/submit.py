"""Submit a training run: check everything, write the files, hand them to Slurm."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from pretrain.config import RunConfig, runnable_text
from pretrain.supervision.lease import check_free
from pretrain.supervision.progress_file import read_progress
from slurm import scheduler
from slurm.batch_files.plan import TrainingPlan, plan_training
from slurm.batch_files.render import render
from slurm.batch_files.site import Site
from slurm.job.state import BATCH_FILE, HEALTH_FILE, RUN_FILE, STOP_FILE, RunState, write
from slurm.job_files import copy_job_files
from xlstm_io.errors import ConfigError, UserError
from xlstm_io.storage import write_atomic


def make_plan(config: RunConfig, site: Site, nodes: int) -> TrainingPlan:
    """The plan of a run, with what is known of its speed when it has run before."""
    progress = read_progress(Path(config.run.dir))
    return plan_training(
        config,
        site,
        nodes,
        save_s=(progress and progress.save_seconds) or 0.0,
        step_s=(progress and progress.step_seconds) or 0.0,
    )


def submit_training(
    config: RunConfig, site: Site, nodes: int, *, dry_run: bool = False, after: str | None = None
) -> int:
    """Submit a run, and print the number of the job.

    Args:
        config: the run.
        site: the cluster.
        nodes: of the job.
        dry_run: check and write the files, print them and what the cluster is like, and stop there.
        after: a job that has to end well first.

    Returns:
        0.

    Raises:
        UserError: it cannot work; nothing was submitted.
    """
    from pretrain.commands.before_run.check_data import (
        describe_data,  # needs torch, and `render` does not
    )

    plan = make_plan(config, site, nodes)
    files = RunState(plan.run)
    describe_data(config, leave_out="")  # what `pretrain check` refuses
    _check_run(files, plan)
    known = scheduler.known_nodes(site.partition)
    _check_nodes(files, site, nodes, known)
    state = files.load()
    text = render(plan)
    write_files(plan, config, text)
    file = files.folder / BATCH_FILE
    options = scheduler.exclude_option(state.excluded, known)
    when = scheduler.test_only(file, options)
    if after is not None:
        options += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    facts = scheduler.facts(site.partition)
    notes = what_hurts(facts, site, plan)
    if dry_run:
        print(text)
        for line in (when, scheduler.facts_line(facts), *notes):
            print(f"# {line}")
        return 0
    job = scheduler.submit(file, options)
    note_submission(files, job)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(job)
    return 0


def write_files(plan: TrainingPlan, config: RunConfig, text: str) -> None:
    """Write what a job needs into the run folder; ConfigError when that cannot be done."""
    files = RunState(plan.run)
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
        copy_job_files(files.folder / "job")
        write_atomic(files.folder / RUN_FILE, runnable_text(config).encode())
        files.save_policy(plan.policy)
        if plan.health is not None:
            write(files.folder / HEALTH_FILE, asdict(plan.health))
        write_atomic(files.folder / BATCH_FILE, text.encode())
    except OSError as error:
        raise ConfigError(f"run.dir={plan.run} cannot be written ({error.strerror})") from error


def note_submission(files: RunState, job: str) -> None:
    """Write down that a job has the run from now on, by the will of a person."""
    forgive(files, job)
    files.tell("submit", f"job {job}", job=job)


def forgive(files: RunState, job: str) -> None:
    """Let a job have the run: what stopped the last one is answered, and all limits count anew."""
    state = files.load()
    since = state.lives[-1].number if state.lives else 0
    files.save(replace(state, job=job, verdict="", since=since))
    (files.folder / STOP_FILE).unlink(missing_ok=True)


def check_not_held(files: RunState) -> None:
    """Nothing while no living job has the run; UserError names the job that has it."""
    job = scheduler.first_queued(files.load().jobs)
    if job is not None:
        raise UserError(
            f"job {job.job} has the run {files.run} ({job.state}); "
            f"{scheduler.command('status', files.run)} shows it, "
            f"{scheduler.command('stop', files.run)} ends it"
        )
    check_free(files.run)


def _check_run(files: RunState, plan: TrainingPlan) -> None:
    if files.finished(plan.policy.steps):
        raise ConfigError(
            f"run.dir={plan.run}: all {plan.policy.steps} steps are done; set run.steps higher to "
            "train on, or use another run.dir"
        )
    check_not_held(files)


def _check_nodes(files: RunState, site: Site, nodes: int, known: Sequence[str]) -> None:
    if site.gpus_per_node and known:
        most = scheduler.gpus_of_nodes(site.partition)
        if site.gpus_per_node > most:
            raise ConfigError(
                f"gpus_per_node={site.gpus_per_node}, and no node of partition {site.partition} "
                f"has more than {most}; use at most {most}, or another partition"
            )
    left = len(set(known) - set(files.load().excluded))
    if known and left < nodes:
        raise ConfigError(
            f"--nodes {nodes}: partition {site.partition} has {len(known)} nodes, and "
            f"{len(known) - left} of them are left out (RUN/slurm/state.json); use fewer nodes"
        )


def what_hurts(facts: Mapping[str, str], site: Site, plan: TrainingPlan) -> list[str]:
    """What of a cluster hurts this run, in sentences.

    Args:
        facts: what `scheduler.facts` says of the cluster.
        site: the site file.
        plan: of the run.
    """
    progress = read_progress(plan.run)
    lines = scheduler.too_late_to_save(progress.save_seconds if progress else None, facts)
    if facts["JobRequeue"] == "0" and site.requeue == "requeue":
        lines.append("JobRequeue=0: where the site forbids --requeue too, a new job is submitted")
    if "CANCEL" in facts["PreemptMode"] and site.requeue != "chain":
        lines.append("PreemptMode=CANCEL: a preempted job does not come back; use requeue: chain")
    timeout = scheduler.seconds_of(facts["SlurmdTimeout"])
    if timeout > 60:
        lines.append(
            f"a lost node is noticed after SlurmdTimeout={timeout} s, and all ranks wait so long"
        )
    return lines


def resubmit(files: RunState) -> str:
    """Submit the files of a run again; the number of the job.

    Raises:
        UserError: there are no files, or Slurm refuses them.
    """
    file = files.folder / BATCH_FILE
    if not file.is_file():
        raise UserError(f"{files.run} was never submitted; use python -m slurm submit train")
    excluded = scheduler.exclude_option(files.load().excluded, scheduler.all_nodes())
    job = scheduler.submit(file, excluded)
    note_submission(files, job)
    return job
