"""The GPUs of this machine, before torch is imported: how many, and what they read at the start."""

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from xlstm_io.errors import ConfigError

# Devices that the drivers of NVIDIA, AMD and Windows' Linux make.
DRIVERS = tuple(map(Path, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")))


def count_gpus() -> int:
    """How many GPUs a process that is started now can use; 0 without a driver or a build for it.

    A process of its own asks torch, which takes some seconds, and only where there is a driver.
    """
    if not any(driver.exists() for driver in DRIVERS):
        return 0
    ask = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    found = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, check=False
    ).stdout.split()
    return int(found[-1]) if found and found[-1].isdigit() else 0


def check_gpus(nproc: int) -> None:
    """Check that every worker of this machine gets a GPU of its own, or none of them one.

    Args:
        nproc: how many workers are to start.

    Raises:
        ConfigError: there are GPUs, and fewer than workers.
    """
    gpus = count_gpus() if nproc > 1 else 0
    if 0 < gpus < nproc:
        raise ConfigError(
            f"{nproc} processes need {nproc} GPUs, and this machine shows {gpus}; use --nproc "
            f"{gpus} with a layout that fits, or CUDA_VISIBLE_DEVICES= in front of the command to "
            "train on the CPU"
        )


def set_device_defaults(
    tensor_parallel: int, environment: MutableMapping[str, str] = os.environ
) -> None:
    """Set what CUDA, torch's allocator and Triton read when they start; what is set already stays.

    Without a GPU nothing reads it.

    Args:
        tensor_parallel: tensor-parallel size of the run.
        environment: that of this process, or of one that is to start.
    """
    # Blocks that grow in place. A run that fills nine tenths of a GPU fails otherwise for want of
    # one large block, with the memory free in parts. The second is the name since torch 2.10.
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        environment.setdefault(name, "expandable_segments:True")
    if tensor_parallel > 1:
        # One queue of work per device, so that tensor-parallel messages start before the products
        # they should hide behind, as megatron-core assumes. Without tensor parallelism it would
        # only put the reduction of gradients behind the backward pass.
        environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if "TRITON_CACHE_DIR" not in environment and any(driver.exists() for driver in DRIVERS):
        cache = _own_folder(Path(tempfile.gettempdir()) / f"triton-{os.getuid()}")
        if cache is not None:
            environment["TRITON_CACHE_DIR"] = str(cache)


def _own_folder(path: Path) -> Path | None:
    """A folder on this node that nobody else can write into; None where one cannot be had.

    All ranks of a node compile the same kernels at the same time, which takes minutes in a home
    folder that many nodes share. But what lies in the cache is run as code, and everybody can make
    folders in /tmp.
    """
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError:
        return None
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return path if own and not found.st_mode & 0o077 else None
