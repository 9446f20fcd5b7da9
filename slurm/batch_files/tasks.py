"""Jobs around a run: checking its nodes, preparing its data, evaluating it, converting it.

Unlike training they have no policy: each can be submitted again, and goes on from what is finished.
"""

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pretrain.config import RunConfig, runnable_text
from slurm import scheduler
from slurm.batch_files.plan import (
    JobPlan,
    check_site,
    common_fields,
    common_options,
    health_of,
    job_name,
    tasks_per_node,
)
from slurm.batch_files.render import render
from slurm.batch_files.site import Site
from slurm.job.state import (
    CHECKPOINTS_FOLDER,
    FOLDER,
    HEALTH_FILE,
    POLICY_FILE,
    RUN_FILE,
    read_json,
)
from slurm.job_files import copy_job_files
from xlstm_io.errors import ConfigError, UserError
from xlstm_io.foreign.yaml_file import read_yaml
from xlstm_io.storage import absolute, write_atomic

SIGNAL_S = 120  # before the time limit; data preparation stops at once and keeps what is finished


@dataclass(frozen=True)
class TaskPlan(JobPlan):
    """A job of one node, or an array of them.

    Attributes:
        file: where the batch file goes.
        restarts: how often an element of an array is started again after a signal.
        option: of the command, which takes the number of an array's element.
        beside: further files that the job reads, by name; they lie beside the batch file.
        check: a command that says, before anything queues, whether the job can begin.
        copies: folder of the modules that the batch script itself runs; None where it runs none.
    """

    file: Path
    restarts: int
    option: str = "--task"
    beside: Mapping[str, str] = field(default_factory=dict)
    check: tuple[str, ...] = ()
    copies: Path | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan(TaskPlan):
    """A job that evaluates every checkpoint of a run as it comes.

    Attributes:
        run: the run folder.
        wait_s: seconds in the queue before it looks again.
        requeue: how it comes back; of the site.
    """

    run: Path
    wait_s: int
    requeue: str


def shards_of(file: Path) -> Path:
    """The folder that a build file says its shards go to; UserError when it says none."""
    values = read_yaml(file, of="build file", example="input:, out:", error=UserError)
    if not isinstance(values.get("out"), str):
        raise UserError(f"{file} has no out; jobs take the folder of the shards from the file")
    return Path(values["out"])


def plan_preparation(
    file: Path,
    out: Path,
    site: Site,
    elements: int,
    *,
    folder: Path | None = None,
    allow_functions: bool = False,
) -> list[TaskPlan]:
    """The jobs of `data_prep build`: an array, and the merge of its parts.

    Args:
        file: the YAML file of the build.
        out: the folder of the shards that it names.
        site: the cluster; its GPUs are not asked for.
        elements: of the array, one node each.
        folder: where the jobs work; the current folder if None.
        allow_functions: run the code that the file names.

    Raises:
        UserError: the site does not go with the jobs.
    """
    folder = folder or Path.cwd()
    if elements < 1:
        raise UserError(f"--nodes {elements} is not an array; use 1 or more")
    out = folder / out
    jobs = _folder_beside(out)
    allowed = ("--allow-functions",) if allow_functions else ()
    build = ("-m", "data_prep", "build", str(folder / file), *allowed)
    merge = ("-m", "data_prep", "merge", str(out))
    name, words = job_name(out), (*build, "--tasks", str(elements))
    array = _task_fields(site, jobs, folder, f"{name}-prep", words, array=elements)
    return [
        TaskPlan(**array, check=(*build, "--check")),
        TaskPlan(**_task_fields(site, jobs, folder, f"{name}-merge", merge)),
    ]


def plan_evaluation(
    run: Path,
    site: Site,
    options: Sequence[str],
    *,
    every_minutes: float | None = None,
    folder: Path | None = None,
) -> list[TaskPlan]:
    """The job of `pretrain evaluate`, tensor parallel over the ranks of one node.

    Args:
        run: a run folder or a checkpoint.
        site: the cluster.
        options: keys of the run file, as words.
        every_minutes: evaluate each checkpoint of the run as it comes, and wait so long in the
            queue before looking again; None for one evaluation.
        folder: where the job works; the current folder if None.

    Raises:
        ConfigError: every checkpoint of a run whose checkpoints lie elsewhere.
    """
    folder = folder or Path.cwd()
    path = folder / run
    words = ("-m", "pretrain", "evaluate", str(path), *options)
    name = f"{job_name(path)}-evaluate"
    ranks, jobs = tasks_per_node(site), path / FOLDER
    fields = _task_fields(site, jobs, folder, name, words, ranks=ranks, gpus=True)
    if every_minutes is None:
        return [TaskPlan(**fields)]
    _check_checkpoints_lie_in(path)
    fields["template"] = "evaluate_each.sbatch.j2"
    return [
        EvaluationPlan(
            **fields,
            copies=fields["file"].with_suffix(".job"),
            run=path,
            wait_s=math.ceil(60 * every_minutes),
            requeue=site.requeue,
        )
    ]


def _check_checkpoints_lie_in(run: Path) -> None:
    """Nothing where a run has its checkpoints in its folder, as far as its last job says."""
    own = run / CHECKPOINTS_FOLDER
    folder = read_json(run / FOLDER / POLICY_FILE).get("checkpoints", str(own))
    if folder is None or absolute(folder) != absolute(own):
        raise ConfigError(
            f"checkpoint.dir of {run} is {folder or 'on an object store'}, and --every-checkpoint "
            f"looks into {own}; evaluate its checkpoints one by one"
        )


def plan_conversion(
    checkpoint: Path, out: Path, site: Site, *, folder: Path | None = None
) -> list[TaskPlan]:
    """The job of `convert to-hf`, one process.

    Args:
        checkpoint: a checkpoint or a run folder.
        out: the folder to write.
        site: the cluster; its GPUs are not asked for.
        folder: where the job works; the current folder if None.
    """
    folder = folder or Path.cwd()
    words = ("-m", "xlstm_mcore.convert", "to-hf", str(folder / checkpoint), str(folder / out))
    jobs = _folder_beside(folder / out)
    fields = _task_fields(site, jobs, folder, f"{job_name(folder / out)}-convert", words)
    return [TaskPlan(**fields, check=(*words, "--dry-run"))]


def plan_preflight(
    config: RunConfig, site: Site, nodes: int, *, folder: Path | None = None
) -> list[TaskPlan]:
    """The job that checks nodes as every life of a run may, and trains nothing.

    Args:
        config: the run, whose kernels are tried and whose disk is looked at.
        site: the cluster; its `health.preflight` is not asked.
        nodes: to check.
        folder: where the job works; the current folder if None.
    """
    folder = folder or Path.cwd()
    run, tasks = folder / config.run.dir, tasks_per_node(site)
    site = site.model_copy(update={"health": site.health.model_copy(update={"preflight": True})})
    check_site(site, run)
    jobs = run / FOLDER / "preflight"
    options = common_options(
        site,
        name=f"{job_name(run)}-preflight",
        nodes=nodes,
        tasks=tasks,
        output=f"{jobs}/%j.out",
        signal_s=SIGNAL_S,
        requeue=False,
    )
    return [
        TaskPlan(
            template="preflight.sbatch.j2",
            **common_fields(site, folder, run, nodes=nodes, tasks=tasks),
            scratch=None,
            options=tuple(options),
            words=(),
            file=jobs / "preflight.sbatch",
            restarts=0,
            copies=jobs / "preflight.job",
            beside={
                RUN_FILE: runnable_text(config),
                HEALTH_FILE: json.dumps(asdict(health_of(site)), indent=1) + "\n",
            },
        )
    ]


def plan_array(
    name: str,
    results: Path,
    site: Site,
    words: Sequence[str],
    *,
    elements: int,
    option: str,
    folder: Path | None = None,
) -> TaskPlan:
    """An array of any command that works on a part of something, one process each.

    Args:
        name: of the job.
        results: the folder that the elements write into.
        site: the cluster; each element asks for GPUs where it has them.
        words: the command, for Python.
        elements: of the array.
        option: of the command, which takes the number of an element.
        folder: where the jobs work; the current folder if None.
    """
    folder = folder or Path.cwd()
    jobs = _folder_beside(results)
    fields = _task_fields(site, jobs, folder, name, words, array=elements, gpus=True)
    return TaskPlan(**fields, option=option)


def _folder_beside(out: Path) -> Path:
    """Where the files of a job lie whose result is a folder with a format of its own."""
    return out.with_name(f"{out.name}.slurm")


def _task_fields(
    site: Site,
    jobs: Path,
    folder: Path,
    name: str,
    words: Sequence[str],
    *,
    array: int = 0,
    ranks: int = 1,
    gpus: bool = False,
) -> dict[str, Any]:
    """The fields of a `TaskPlan` that every task has."""
    check_site(site, jobs)
    options = common_options(
        site,
        name=name,
        nodes=1,
        tasks=ranks,
        output=f"{jobs}/%A_%a.out" if array else f"{jobs}/%j.out",
        signal_s=SIGNAL_S,
        requeue=site.requeue != "never",
        gpus=gpus,
    )
    if array:
        options.append(f"--array=0-{array - 1}")
    kind = name.rpartition("-")[2]
    return {
        "template": "array.sbatch.j2" if array else "task.sbatch.j2",
        **common_fields(site, folder, jobs.parent, nodes=1, tasks=ranks, gpus=gpus),
        "scratch": None,
        "options": tuple(options),
        "words": tuple(words),
        "file": jobs / f"{kind}.sbatch",
        "restarts": 0 if site.requeue == "never" else site.restarts.total,
    }


def submit_tasks(
    plans: Sequence[TaskPlan], site: Site, *, dry_run: bool = False, after: str | None = None
) -> int:
    """Submit jobs that wait for one another, and print their numbers.

    Args:
        plans: in order; each starts when the one before has ended well.
        site: the cluster.
        dry_run: print the files and submit nothing.
        after: a job that has to end well before the first.

    Returns:
        0.

    Raises:
        UserError: a job could not begin, or Slurm refuses one of them, and none was submitted; or a
            file cannot be written.
    """
    facts = scheduler.facts(site.partition)
    _check_array(plans, facts)
    for plan in plans if after is None else ():  # what that job makes is not there yet
        _check_command(plan)
    for plan in plans:
        text = render(plan)
        if dry_run:
            print(text)
        try:
            plan.file.parent.mkdir(parents=True, exist_ok=True)
            for name, more in plan.beside.items():
                write_atomic(plan.file.with_name(name), more.encode())
            if plan.copies is not None:
                copy_job_files(plan.copies)
            write_atomic(plan.file, text.encode())
        except OSError as error:
            raise ConfigError(f"{plan.file} cannot be written ({error.strerror})") from error
        when = scheduler.test_only(plan.file, [])
        if dry_run:
            print(f"# {when}")
    if dry_run:
        print(f"# {scheduler.facts_line(facts)}")
    for plan in [] if dry_run else plans:
        options = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
        after = scheduler.submit(plan.file, options)
        print(after)
    return 0


def _check_command(plan: TaskPlan) -> None:
    """Ask the command itself whether it can begin; ConfigError with its words when not."""
    if not plan.check:
        return
    words = [sys.executable, *plan.check]
    done = subprocess.run(words, cwd=plan.folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        _, error, message = said.rpartition("error: ")
        raise ConfigError(message if error else said.rpartition("\n")[2])


def _check_array(plans: Sequence[TaskPlan], facts: Mapping[str, str]) -> None:
    most = scheduler.seconds_of(facts["MaxArraySize"])
    for plan in plans:
        for option in plan.options:
            last = option.removeprefix("--array=0-")
            if last != option and int(last) >= most > 0:
                raise ConfigError(
                    f"--nodes {int(last) + 1}: this cluster allows arrays of {most} jobs "
                    "(MaxArraySize); use fewer"
                )
