"""Runs one rank of a training step, and writes down how it ended.

    srun ... python rank.py LIFE_FOLDER -- python -m pretrain train run.yaml

Between Slurm and the trainer, because of three things that were seen on a real cluster:

- A signal that arrives while Python still imports kills the rank. Here the stop signals are blocked
  before the trainer starts. The mask survives `exec`, and they stay pending until the trainer has
  its handlers and unblocks them.
- The first rank to end with 75 makes `--kill-on-bad-exit` end the rank 0 that still saves. Here 75
  becomes 0.
- With `--kill-on-bad-exit` the exit code of the rank that failed is lost. Here it is in a file.

The standard library alone, and no import of the run's environment: it starts within milliseconds.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

STOPPED = 75  # xlstm_io.errors.ExitCode.STOPPED
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
TAIL_LINES = 20
TAIL_BYTES = 64 * 1024
_XID = re.compile(r"\[\s*(\d+\.\d+)\].*NVRM: Xid .*?: (\d+)")


def rank_environment(slurm: dict[str, str]) -> dict[str, str]:
    """The environment of a rank: torchrun's variables from those of Slurm."""
    environment = dict(slurm)
    environment.update(
        RANK=slurm["SLURM_PROCID"],
        WORLD_SIZE=slurm["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=slurm["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=slurm["XLSTM_TASKS_PER_NODE"],
    )
    return environment


def tail(path: Path) -> list[str]:
    """The last lines of a log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return text.splitlines()[-TAIL_LINES:]


def xids(text: str, since: float) -> list[int]:
    """Xid numbers in the kernel's messages.

    Args:
        text: what `dmesg` printed.
        since: only later ones, in seconds since the boot.
    """
    return [int(number) for when, number in _XID.findall(text) if float(when) >= since]


def read_dmesg() -> str:
    """The kernel's messages; "" where a user may not read them."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def memory_kills() -> int:
    """How many processes of this job's control group the kernel has ended for lack of memory."""
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
        events = (Path("/sys/fs/cgroup") / group / "memory.events").read_text()
    except OSError:
        return 0
    return int(dict(line.split() for line in events.splitlines()).get("oom_kill", 0))


def write(path: Path, record: dict) -> None:
    """Replace a record at once."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def main(words: Sequence[str]) -> int:
    """Run a rank to its end.

    Args:
        words: the folder of the life, `--`, and the command.

    Returns:
        The command's exit code, but 0 for 75, and 128 + N after signal N.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    folder, command = Path(words[0]), list(words[2:])
    environment = rank_environment(dict(os.environ))
    rank = int(environment["RANK"])
    path = folder / f"rank-{rank:05d}.json"
    log = folder / f"rank-{rank:05d}.log"
    boot, kills = time.clock_gettime(time.CLOCK_BOOTTIME), memory_kills()
    record = {
        "rank": rank,
        "host": os.environ.get("SLURMD_NODENAME") or os.uname().nodename,
        "step_id": int(environment["SLURM_STEP_ID"]),
        "code": None,  # so it stays when this process is killed too
        "began": time.time(),
        "time": 0.0,
        "tail": [],
        "xids": [],
        "out_of_memory": False,
    }
    write(path, record)
    with open(log, "ab") as output:
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        code = child.wait()
    record |= {"code": code, "time": time.time(), "tail": tail(log)}
    record["out_of_memory"] = memory_kills() > kills
    if code not in (0, STOPPED):
        record["xids"] = xids(read_dmesg(), boot)
    with suppress(OSError):  # on a full disk the exit code is what is left to tell
        write(path, record)
    if code == STOPPED:
        return 0
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
