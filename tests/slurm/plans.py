"""Plans and batch files for the tests: of the example sites, and of sites in a few keys.

    python -m tests.slurm.plans

writes the files of the example sites again, after a change on purpose.
"""

import shlex
from functools import partial
from pathlib import Path

from pretrain.config import load_config
from slurm.batch_files.plan import plan_training
from slurm.batch_files.render import render
from slurm.batch_files.site import load_site, site_from_dict
from slurm.batch_files.tasks import (
    plan_conversion,
    plan_evaluation,
    plan_preflight,
    plan_preparation,
)

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "slurm" / "examples"
PROJECT = Path("/projects/llm")
DEMO = ROOT / "pretrain/configs/cpu_demo.yaml"
LARGE = ROOT / "pretrain/configs/xlstm_7b.yaml"
NODES = {
    "cpu": (DEMO, 1),
    "gpu_modules": (LARGE, 16),
    "pyxis": (LARGE, 16),
    "apptainer": (LARGE, 8),
}


def tasks(kind, name):
    """The plan of a job around a run, on an example site."""
    loaded = load_site(str(EXAMPLES / f"{name}.yaml"))
    if kind == "preflight":
        return plan_preflight(load_config(DEMO, quiet=True), loaded, 2, folder=PROJECT)
    if kind == "evaluate_each":
        return plan_evaluation(Path("runs/r"), loaded, [], every_minutes=10, folder=PROJECT)
    if kind == "evaluate":
        run, words = Path("runs/r"), ["--data.path", "my shards"]
        return plan_evaluation(run, loaded, words, folder=PROJECT)
    if kind == "convert":
        return plan_conversion(Path("runs/r"), Path("exports/r"), loaded, folder=PROJECT)
    build = (Path("build.yaml"), Path("shards/web"))
    array, merge = plan_preparation(*build, loaded, 64, folder=PROJECT)
    return [array if kind == "prep" else merge]


TASKS = {
    f"{name}.{kind}": partial(tasks, kind, name)
    for kind, name in (
        ("prep", "cpu"),
        ("merge", "cpu"),
        ("preflight", "cpu"),
        ("evaluate_each", "gpu_modules"),
        ("evaluate", "gpu_modules"),
        ("convert", "gpu_modules"),
    )
}


def site(**keys):
    return site_from_dict({"partition": "main", "python": "/usr/bin/python3", **keys}, "site.yaml")


def plan(*, nodes=1, overrides=(), folder=PROJECT, speed=None, **keys):
    config = load_config(DEMO, overrides, quiet=True)
    keys.setdefault("tasks_per_node", 2)
    return plan_training(config, site(**keys), nodes, folder=folder, **(speed or {}))


def example(name):
    """The batch file of an example site."""
    if name in TASKS:
        (plan,) = TASKS[name]()
        return render(plan)
    file, nodes = NODES[name]
    config = load_config(file, quiet=True)
    loaded = load_site(str(EXAMPLES / f"{name}.yaml"))
    return render(plan_training(config, loaded, nodes, folder=PROJECT))


def directives(text):
    """The words of the #SBATCH lines, unquoted."""
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    return [word for line in lines for word in shlex.split(line.removeprefix("#SBATCH "))]


if __name__ == "__main__":
    for name in (*NODES, *TASKS):
        (EXAMPLES / f"{name}.sbatch").write_text(example(name))
