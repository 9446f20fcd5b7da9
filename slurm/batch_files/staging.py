"""What a job copies to each node's own disk before it trains, and how the ranks find it there."""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from pretrain.config import RunConfig
from slurm.batch_files.site import Site, SiteError
from xlstm_io.remote import is_remote

VENV = "venv"
_JOB = "JOB-NUMBER"  # stands for the number of the job until the shell puts it in


@dataclass(frozen=True)
class Staging:
    """The copies of a job.

    Attributes:
        copies: pairs of a folder that all nodes see, and the name of its copy.
        data: the copies by the paths that the run file names, as JSON and shell code; "" for none.
        venv: whether the ranks run from a copy of their virtual environment.
    """

    copies: tuple[tuple[str, str], ...]
    data: str
    venv: bool


def plan_staging(config: RunConfig, site: Site, folder: Path) -> Staging | None:
    """The copies that a site wants of a run; None for none.

    Args:
        config: the run, whose folders of shards are copied. Remote ones have a cache of their own.
        site: the cluster.
        folder: where the job works.

    Raises:
        SiteError: there is no disk to copy to, or no virtual environment to copy.
    """
    wanted = site.stage
    if not (wanted.data or wanted.venv):
        return None
    if site.scratch is None:
        raise SiteError("stage copies to each node's own disk; set scratch, a folder on it")
    copies: dict[str, str] = {}
    data: dict[str, str] = {}
    for _, path in config.data.folders if wanted.data else ():
        if not is_remote(path):
            copy = copies.setdefault(str(folder / path), f"shards-{len(copies)}")
            data[path] = f"{site.scratch}/xlstm-{_JOB}/{copy}"
    if wanted.venv:
        copies[str(_environment(site))] = VENV
    words = _code(json.dumps(data)) if data else ""
    return Staging(tuple(copies.items()), words, wanted.venv) if copies else None


def _environment(site: Site) -> Path:
    """The virtual environment of the ranks."""
    if site.container.kind != "none":
        raise SiteError(f"stage.venv goes with container.kind=none, not {site.container.kind}")
    python = Path(site.python or sys.executable)
    if not (python.parent.parent / "pyvenv.cfg").is_file():
        raise SiteError(f"stage.venv: {python} is not in a virtual environment; set python")
    return python.parent.parent


def _code(text: str) -> str:
    """A word of the shell, with the number of the job put in by it."""
    return '"$SLURM_JOB_ID"'.join(shlex.quote(part) for part in text.split(_JOB))
