"""The files that a batch script needs beside itself, copied to it at submission.

A job waits in the queue for days, and its lives last for weeks: it must not change because somebody
updates a checkout meanwhile. The host of a batch script may also lack the run's environment, when
that is in a container.
"""

import shutil
from pathlib import Path

import slurm
import slurm.job
import xlstm_io

MODULES = {
    slurm: ("__init__.py", "scheduler.py"),
    slurm.job: (
        "__init__.py",
        "state.py",
        "decide.py",
        "evaluations.py",
        "follow.py",
        "health.py",
        "life.py",
        "rank.py",
    ),
    xlstm_io: ("__init__.py", "errors.py", "remote.py", "rendezvous.py"),
}
SHELL = ("batch.sh", "stage.sh")


def copy_job_files(folder: Path) -> None:
    """Copy what a batch script needs into a folder; its Python finds the modules there."""
    for package, names in MODULES.items():
        source = Path(str(package.__file__)).parent
        target = folder.joinpath(*package.__name__.split("."))
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            _replace(source / name, target / name)
    for name in SHELL:
        _replace(Path(str(slurm.job.__file__)).with_name(name), folder / name)


def _replace(source: Path, target: Path) -> None:
    """Copy at once: a running batch script may read the old file."""
    temporary = target.with_suffix(".tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)
