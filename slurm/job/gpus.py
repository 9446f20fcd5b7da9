"""What `nvidia-smi` and the kernel say about a node's GPUs, and what of it makes the node unfit.

A value that a GPU or a driver does not have (`[N/A]`) says nothing. Never run on a GPU: the tests
have texts in the form that the manual of `nvidia-smi` gives.
"""

import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from slurm.job.decide import FATAL_XIDS
from slurm.job.rank import read_dmesg, xids

XID_AGE_S = 3600.0  # a GPU may have been reset since an older one
SECONDS = 60
STATE = {
    "ecc.errors.uncorrected.volatile.total": "memory errors that ECC could not correct",
    "retired_pages.pending": "retired pages that wait for a restart",
    "clocks_throttle_reasons.hw_slowdown": "clocks that the hardware has slowed down",
    "clocks_throttle_reasons.hw_thermal_slowdown": "clocks that heat has slowed down",
}
ROWS = {
    "remapped_rows.pending": "remapped rows that wait for a reset",
    "remapped_rows.failure": "rows that could not be remapped",
}


def gpu_problems(job: str) -> list[str]:
    """What is wrong with this node's GPUs; empty where nothing is, or where nobody can say.

    Args:
        job: the Slurm job that may use them.
    """
    problems = bad_values(_ask("--query-gpu=index", STATE), STATE)
    problems += bad_values(_ask("--query-remapped-rows=gpu_uuid", ROWS), ROWS)
    problems += others(_ask("--query-compute-apps=pid", {"process_name": ""}), job, environment_of)
    since = time.clock_gettime(time.CLOCK_BOOTTIME) - XID_AGE_S
    fatal = sorted(FATAL_XIDS & set(xids(read_dmesg(), since)))
    return problems + [f"Xid {number} in the kernel's messages" for number in fatal]


def _ask(query: str, columns: Mapping[str, str]) -> str:
    """Lines of comma-separated values; "" where `nvidia-smi` is missing, old, or fails."""
    words = ["nvidia-smi", ",".join([query, *columns]), "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def bad_values(text: str, columns: Mapping[str, str]) -> list[str]:
    """What is not as it should be: every value is 0, No or Not Active on a sound GPU.

    Args:
        text: the lines of `nvidia-smi`, the GPU's name first.
        columns: what a bad value means, by column.
    """
    found = []
    for line in text.splitlines():
        gpu, *values = (value.strip() for value in line.split(","))
        for value, what in zip(values, columns.values(), strict=False):
            if value in ("Yes", "Active") or (value.isdecimal() and int(value) > 0):
                found.append(f"GPU {gpu} has {what}")
    return found


def others(text: str, job: str, environment: Callable[[int], bytes | None]) -> list[str]:
    """Processes on the GPUs that are not of this job.

    Args:
        text: the lines of `nvidia-smi`, process number and name.
        job: the Slurm job that may use them.
        environment: the variables of a process; None when it cannot be seen from here.
    """
    found = []
    for line in text.splitlines():
        pid, _, name = (part.strip() for part in line.partition(","))
        variables = environment(int(pid)) if pid.isdecimal() else None
        if variables is not None and f"SLURM_JOB_ID={job}".encode() not in variables.split(b"\0"):
            found.append(f"another process is on a GPU: {name} ({pid})")
    return found


def environment_of(pid: int) -> bytes | None:
    """The variables of a process: b"" for another user's, None for one that is not here."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except PermissionError:
        return b""
    except OSError:
        return None
