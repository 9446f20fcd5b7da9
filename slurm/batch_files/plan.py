"""A run file and a site as a plan of a job: all arithmetic, and everything that cannot work.

Nothing here asks Slurm or writes a file.
"""

import hashlib
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config import RunConfig, check_world
from pretrain.supervision.job_end import seconds_to_stop
from slurm.batch_files.site import Site, SiteError, time_limit_seconds
from slurm.batch_files.staging import Staging, plan_staging
from slurm.job.health import Health
from slurm.job.state import CHECKPOINTS_FOLDER, FOLDER, RUN_FILE, Policy
from xlstm_io.errors import ConfigError
from xlstm_io.remote import is_remote

# Folders that every node has for itself, where no other node finds a run.
OWN_OF_A_NODE = ("/tmp", "/dev/shm")
LEAST_SIGNAL_S = 120
MOST_NODES_TRIED = 1024
# Options that a key of the site file or the plan sets.
_OPTION_KEYS = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "reservation": "reservation",
    "constraint": "constraint",
    "time": "time",
    "mail-user": "mail",
    "mail-type": "mail",
    "nice": "nice",
    "gpus-per-node": "gpus_per_node",
    "gres": "gres",
    "mem": "mem",
    "cpus-per-task": "cpus_per_task",
    "ntasks-per-node": "tasks_per_node",
    "exclusive": "exclusive",
    "signal": "signal",
    "requeue": "requeue",
    "no-requeue": "requeue",
    "nodes": "--nodes",
    "job-name": "run.dir",
    "output": "run.dir",
    "open-mode": "the policy of restarts",
    "export": "env",
    "exclude": "the policy of restarts",
    "nodelist": "nothing: a job pinned to nodes waits for ever for one that is gone",
}


@dataclass(frozen=True)
class JobPlan:
    """What every template prints.

    Attributes:
        template: its name.
        folder: where the job works.
        options: of `#SBATCH`, as they stand there.
        step: options of `srun`.
        container: what stands before the command of a rank.
        python: interpreter of the batch script.
        rank_python: interpreter of the ranks.
        modules, setup, env, scratch: of the site.
        words: what follows the command.
    """

    template: str
    folder: Path
    options: tuple[str, ...]
    step: tuple[str, ...]
    container: tuple[str, ...]
    python: str
    rank_python: str
    modules: tuple[str, ...]
    setup: tuple[str, ...]
    env: dict[str, str]
    scratch: str | None
    words: tuple[str, ...]


@dataclass(frozen=True)
class TrainingPlan(JobPlan):
    """A job that trains.

    Attributes:
        run: the run folder.
        tasks_per_node: ranks of a node.
        policy: the limits of restarting.
        signal_s: seconds between the signal and the time limit.
        health: what the preflight asks of a node; None for no preflight.
        staging: what is copied to each node's own disk; None for nothing.
    """

    run: Path
    tasks_per_node: int
    policy: Policy
    signal_s: int
    health: Health | None
    staging: Staging | None


def plan_training(
    config: RunConfig,
    site: Site,
    nodes: int,
    *,
    folder: Path | None = None,
    save_s: float = 0.0,
    step_s: float = 0.0,
) -> TrainingPlan:
    """The job of a training run.

    Args:
        config: the run.
        site: the cluster.
        nodes: of the job.
        folder: where the job works; the current folder if None.
        save_s: seconds of the last save, where the run has saved already.
        step_s: seconds of a step, where they are known.

    Raises:
        SiteError: the site does not go with the job.
        ConfigError: the ranks do not fit the layout, or the run folder cannot be used by a job.
    """
    folder = folder or Path.cwd()
    run = folder / config.run.dir
    check_site(site, run)
    if nodes < 1:
        raise SiteError(f"--nodes {nodes} is not a job; use 1 or more")
    tasks = tasks_per_node(site)
    _check_layout(config, nodes, tasks)
    signal_s = _signal_seconds(site, save_s, step_s)
    if time_limit_seconds(site.time) <= signal_s + 2 * save_s:
        raise SiteError(
            f"time={site.time} ends before a run can stop: the signal comes {signal_s} s before the"
            f" limit, and a save takes {save_s:.0f} s; use a longer time"
        )
    checkpoints = str(config.checkpoint.dir or run / CHECKPOINTS_FOLDER)
    most = site.restarts.max_excluded or max(2, math.ceil(nodes / 10))
    options = common_options(
        site,
        name=job_name(run),
        nodes=nodes,
        tasks=tasks,
        output=f"{run}/{FOLDER}/%j.out",
        signal_s=signal_s,
        requeue=site.requeue == "requeue",
    )
    return TrainingPlan(
        template="train.sbatch.j2",
        **common_fields(site, folder, run, nodes=nodes, tasks=tasks),
        scratch=site.scratch,
        options=tuple(options),
        words=(str(run / FOLDER / RUN_FILE),),
        run=run,
        tasks_per_node=tasks,
        policy=Policy(
            steps=config.run.steps,
            checkpoints=None if is_remote(checkpoints) else str(folder / checkpoints),
            mode=site.requeue,
            without_progress=site.restarts.without_progress,
            total=site.restarts.total,
            waits=tuple(60 * minutes for minutes in site.restarts.wait_minutes),
            max_excluded=most,
            stops_in_time=site.signal.seconds == "auto",
        ),
        signal_s=signal_s,
        health=health_of(site) if site.health.preflight else None,
        staging=plan_staging(config, site, folder),
    )


def common_fields(
    site: Site, folder: Path, mounted: Path, *, nodes: int, tasks: int, gpus: bool = True
) -> dict[str, Any]:
    """The fields of a plan that depend on the site alone.

    Args:
        site: the cluster.
        folder: where the job works.
        mounted: a folder that a container must see too.
        nodes: of the job.
        tasks: processes of a node.
        gpus: whether they use the node's GPUs.
    """
    python = site.python or sys.executable
    return {
        "folder": folder,
        "step": tuple(_step(site, nodes, tasks, gpus)),
        "container": tuple(_container(site, mounted, folder)),
        "python": python,
        "rank_python": python if site.container.kind == "none" else site.container.python,
        "modules": tuple(site.modules),
        "setup": tuple(site.setup),
        "env": _environment(site),
    }


def tasks_per_node(site: Site) -> int:
    """Ranks of a node."""
    return site.tasks_per_node or max(1, site.gpus_per_node)


def job_name(run: Path) -> str:
    """The name of a run's jobs; no other run of the user has it, which `chain` relies on."""
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", run.name)[:40]
    return f"xlstm-{readable}-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}"


def _check_layout(config: RunConfig, nodes: int, tasks: int) -> None:
    try:
        check_world(config, nodes * tasks)
    except ConfigError as error:
        fitting = []
        for count in range(1, MOST_NODES_TRIED + 1):
            try:
                check_world(config, count * tasks)
                fitting.append(count)
            except ConfigError:
                continue
        good = ", ".join(map(str, sorted(fitting, key=lambda n: abs(n - nodes))[:6]))
        remedy = f"numbers of nodes that fit: {good}" if good else "no number of nodes fits"
        raise ConfigError(f"{nodes} nodes with {tasks} ranks each: {error}; {remedy}") from None


def check_site(site: Site, folder: Path) -> None:
    """Nothing when jobs of a site can use a folder; SiteError names every reason why not."""
    problems = [*_folder_problems(folder, site), *_option_problems(site)]
    if problems:
        raise SiteError("\n".join(problems))


def _folder_problems(run: Path, site: Site) -> list[str]:
    """Why a job cannot use this folder."""
    if "%" in str(run) or "\n" in str(run):
        return [f"{str(run)!r} has a % or a line break, which Slurm replaces; rename it"]
    own = (*OWN_OF_A_NODE, *([site.scratch] if site.scratch else []))
    return [
        f"{run} is on a disk of each node's own ({place}); use a folder that all nodes see"
        for place in own
        if run.is_relative_to(place)
    ]


def _option_problems(site: Site) -> list[str]:
    """What is said twice, or belongs into another key."""
    problems = []
    for option in site.extra_sbatch:
        key = _OPTION_KEYS.get(option.removeprefix("--").partition("=")[0].split()[0])
        if key is not None:
            problems.append(f"extra_sbatch has {option}, which is set by {key}; remove it there")
    if site.gres and site.gpus_per_node == 0:
        problems.append(f"gres={site.gres} asks for GPUs, and gpus_per_node=0; set both")
    asked = sorted(site.health.model_fields_set - {"preflight"})
    if asked and not site.health.preflight:
        problems.append(f"health.{asked[0]} is set, and health.preflight=false; set it to true")
    container = site.container
    if container.kind == "none":
        given = sorted(container.model_fields_set - {"kind"})
        if given:
            problems.append(f"container.{given[0]} is set, and container.kind=none; set the kind")
    elif container.image is None:
        problems.append(f"container.kind={container.kind} needs container.image")
    return problems


def _signal_seconds(site: Site, save_s: float, step_s: float) -> int:
    if site.signal.seconds != "auto":
        return site.signal.seconds
    return max(LEAST_SIGNAL_S, seconds_to_stop(save_s, step_s))


def common_options(
    site: Site,
    *,
    name: str,
    nodes: int,
    tasks: int,
    output: str,
    signal_s: int,
    requeue: bool,
    gpus: bool = True,
) -> list[str]:
    """Options of `#SBATCH` that every job has.

    Args:
        site: the cluster.
        name: of the job.
        nodes: of the job.
        tasks: processes of a node.
        output: where its output goes, in Slurm's notation.
        signal_s: seconds between the signal and the time limit.
        requeue: whether the job may run again.
        gpus: whether it needs the node's GPUs.
    """
    options: dict[str, Any] = {
        "job-name": name,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "reservation": site.reservation,
        "constraint": site.constraint,
        "nice": site.nice,
        "mail-user": site.mail,
        "mail-type": "END,FAIL" if site.mail else None,
        "nodes": nodes,
        "ntasks-per-node": tasks,
    }
    if site.gpus_per_node and gpus:
        options |= {"gres": site.gres} if site.gres else {"gpus-per-node": site.gpus_per_node}
    options |= {
        "cpus-per-task": site.cpus_per_task,
        "mem": site.mem,
        "exclusive": True if site.exclusive else None,
        "time": site.time,
        "requeue" if requeue else "no-requeue": True,
        "open-mode": "append",
        "output": output,
        "signal": f"{site.signal.name}@{signal_s}",
        "export": "NONE",
        "wait-all-nodes": 1 if nodes > 1 else None,
    }
    given = {key: value for key, value in options.items() if value is not None}
    found = [f"--{key}" if value is True else f"--{key}={value}" for key, value in given.items()]
    return [*found, *site.extra_sbatch]


def _step(site: Site, nodes: int, tasks: int, gpus: bool) -> list[str]:
    """Options of the `srun` of the ranks; it takes over the job's only in part."""
    words = [f"--nodes={nodes}", f"--ntasks={nodes * tasks}", f"--ntasks-per-node={tasks}"]
    if site.cpus_per_task:
        words.append(f"--cpus-per-task={site.cpus_per_task}")
    if site.gpus_per_node and gpus:
        # Bound to one GPU each, the ranks could not reach each other's, and none had its number.
        words.append("--gpu-bind=none")
    container = site.container
    if container.kind == "pyxis":
        words.append(f"--container-image={container.image}")
        words += container.flags
    return words


def _container(site: Site, run: Path, folder: Path) -> list[str]:
    """What stands before the command of a rank, and for pyxis what belongs to `srun`."""
    container = site.container
    if container.kind == "none":
        return []
    own = [folder, run, *([site.scratch] if site.scratch else [])]
    mounts = ",".join(dict.fromkeys([*container.mounts, *(f"{path}:{path}" for path in own)]))
    workdir = container.workdir or str(folder)
    if container.kind == "pyxis":
        return [f"--container-mounts={mounts}", f"--container-workdir={workdir}"]
    gpu = ["--nv"] if site.gpus_per_node else []
    words = ["apptainer", "exec", *gpu, "--bind", mounts, "--pwd", workdir, *container.flags]
    return [*words, str(container.image)]


def health_of(site: Site) -> Health:
    """What a preflight asks of a node."""
    wanted = site.health
    return Health(
        command=wanted.command,
        min_gemm_tflops=wanted.min_gemm_tflops,
        min_allreduce_gbs=wanted.min_allreduce_gbs,
        max_clock_skew_s=wanted.max_clock_skew_s,
        min_free_run_gb=wanted.min_free_gb.run,
        min_free_scratch_gb=wanted.min_free_gb.scratch,
        devices=site.gpus_per_node,
        scratch=site.scratch,
    )


def _environment(site: Site) -> dict[str, str]:
    found: dict[str, str] = {}
    if site.cpus_per_task:
        found["OMP_NUM_THREADS"] = str(site.cpus_per_task)
    if site.network.interface:
        found["GLOO_SOCKET_IFNAME"] = found["NCCL_SOCKET_IFNAME"] = site.network.interface
    return {**found, **site.network.env, **site.env}
