"""Jobs around a run: preparing its data, evaluating it, converting a checkpoint.

Unlike training they have no policy: each can be submitted again, and goes on from what is finished.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slurm import scheduler
from slurm.batch_files.plan import (
    JobPlan,
    check_site,
    common_fields,
    common_options,
    job_name,
    tasks_per_node,
)
from slurm.batch_files.render import render
from slurm.batch_files.site import Site
from slurm.job.state import FOLDER
from xlstm_io.errors import ConfigError, UserError
from xlstm_io.storage import write_atomic
from xlstm_io.yaml_file import read_yaml

SIGNAL_S = 120  # before the time limit; data preparation stops at once and keeps what is finished


@dataclass(frozen=True)
class TaskPlan(JobPlan):
    """A job of one node, or an array of them.

    Attributes:
        file: where the batch file goes.
        restarts: how often an element of an array is started again after a signal.
        option: of the command, which takes the number of an array's element.
    """

    file: Path
    restarts: int
    option: str = "--task"


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
    build = ("-m", "data_prep", "build", str(folder / file), "--tasks", str(elements), *allowed)
    merge = ("-m", "data_prep", "merge", str(out))
    array = _task(site, jobs, folder, f"{job_name(out)}-prep", build, array=elements)
    return [array, _task(site, jobs, folder, f"{job_name(out)}-merge", merge)]


def plan_evaluation(
    run: Path, site: Site, options: Sequence[str], *, folder: Path | None = None
) -> list[TaskPlan]:
    """The job of `pretrain evaluate`, tensor parallel over the ranks of one node.

    Args:
        run: a run folder or a checkpoint.
        site: the cluster.
        options: keys of the run file, as words.
        folder: where the job works; the current folder if None.
    """
    folder = folder or Path.cwd()
    path = folder / run
    words = ("-m", "pretrain", "evaluate", str(path), *options)
    name = f"{job_name(path)}-evaluate"
    return [_task(site, path / FOLDER, folder, name, words, ranks=tasks_per_node(site), gpus=True)]


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
    return [_task(site, jobs, folder, f"{job_name(folder / out)}-convert", words)]


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
    plan = _task(site, jobs, folder, name, words, array=elements, gpus=True)
    return replace(plan, option=option)


def _folder_beside(out: Path) -> Path:
    """Where the files of a job lie whose result is a folder with a format of its own."""
    return out.with_name(f"{out.name}.slurm")


def _task(
    site: Site,
    jobs: Path,
    folder: Path,
    name: str,
    words: Sequence[str],
    *,
    array: int = 0,
    ranks: int = 1,
    gpus: bool = False,
) -> TaskPlan:
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
    return TaskPlan(
        template="array.sbatch.j2" if array else "task.sbatch.j2",
        **common_fields(site, folder, jobs.parent, nodes=1, tasks=ranks, gpus=gpus),
        scratch=None,
        options=tuple(options),
        words=tuple(words),
        file=jobs / f"{kind}.sbatch",
        restarts=0 if site.requeue == "never" else site.restarts.total,
    )


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
        UserError: Slurm refuses one of them, and none was submitted; or a file cannot be written.
    """
    _check_array(plans, site)
    for plan in plans:
        text = render(plan)
        if dry_run:
            print(text)
        try:
            plan.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(plan.file, text.encode())
        except OSError as error:
            raise ConfigError(f"{plan.file} cannot be written ({error.strerror})") from error
        scheduler.test_only(plan.file, [])
    for plan in [] if dry_run else plans:
        options = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
        after = scheduler.submit(plan.file, options)
        print(after)
    return 0


def _check_array(plans: Sequence[TaskPlan], site: Site) -> None:
    most = scheduler.seconds_of(scheduler.facts(site.partition)["MaxArraySize"])
    for plan in plans:
        for option in plan.options:
            last = option.removeprefix("--array=0-")
            if last != option and int(last) >= most > 0:
                raise ConfigError(
                    f"--nodes {int(last) + 1}: this cluster allows arrays of {most} jobs "
                    "(MaxArraySize); use fewer"
                )
