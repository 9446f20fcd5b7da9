"""Where a run's weights come from: code, programs, machine, command and data of each start.

It lies in `starts/LIFE/provenance.json` in the run folder, and in the state of every checkpoint.
It holds no secrets: environment variables are an allow-list, and credentials in URLs are masked.
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xlstm_io.remote import masked_values
from xlstm_io.shards.manifest import Manifest

PACKAGES = (
    "xlstm-pretrain",
    "torch",
    "megatron-core",
    "deepspeed",
    "triton",
    "numpy",
    "webdataset",
    "transformers",
)
ENVIRONMENT = re.compile(
    r"NCCL_\w+|GLOO_\w+|OMP_NUM_THREADS|WORLD_SIZE|TORCH_NCCL_\w+|TRITON_\w+"
    r"|SLURM_(JOB_ID|JOB_NAME|JOB_PARTITION|NNODES|NTASKS|JOB_NODELIST|RESTART_COUNT)"
)
DRIVER = Path("/proc/driver/nvidia/version")
GIT_SECONDS = 20
SOURCES = Path(__file__).parents[2]


def provenance(manifests: Iterable[Manifest]) -> dict[str, Any]:
    """What this process runs, as plain values.

    Args:
        manifests: of the folders of shards that the run trains on.
    """
    found = {
        "code": code(),
        "versions": versions(),
        "host": socket.gethostname(),
        "system": platform.platform(),
        "device": device(),
        "driver": driver(),
        "command": sys.argv,
        "environment": {k: v for k, v in sorted(os.environ.items()) if ENVIRONMENT.fullmatch(k)},
        "data": [
            {
                "folder": str(manifest.root),
                "manifest": manifest.hash,
                "tokenizer": manifest.tokenizer_sha256,
                "sources": {source.name: source.provenance for source in manifest.sources},
            }
            for manifest in manifests
        ],
    }
    return masked_values(found)


def device() -> str | None:
    """The name of the GPU; None where there is none."""
    from xlstm_mcore import hardware  # needs torch, and the rest of this file does not

    return hardware.device_name()


def driver() -> str | None:
    """The version of the GPU's driver as it describes itself; None where there is none."""
    return DRIVER.read_text().splitlines()[0] if DRIVER.exists() else None


def versions() -> dict[str, str]:
    """Python's version, and those of the packages that a run depends on."""
    return {"python": platform.python_version(), **dict(_packages())}


def _packages() -> Iterable[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue


def code(folder: Path = SOURCES) -> dict[str, str | None] | None:
    """The commit of the sources and a hash of what was changed since; None where git cannot say."""

    def git(*words: str) -> bytes:
        return subprocess.run(
            ["git", "-C", str(folder), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=GIT_SECONDS,
            check=True,
        ).stdout

    if not (folder / ".git").exists():  # an installed package may lie in somebody else's checkout
        return None
    try:
        commit, changed = git("rev-parse", "HEAD").decode().strip(), git("diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "diff": hashlib.sha256(changed).hexdigest() if changed else None}
