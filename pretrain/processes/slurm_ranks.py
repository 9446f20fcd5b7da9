"""Ranks for processes that Slurm's `srun` started without a launcher in between.

`srun --ntasks 8 python -m pretrain train run.yaml` starts eight processes, and none of the
variables that torchrun sets is there. Without them every process would train the whole run alone,
in the same folder. So the commands that torchrun can start take their ranks from Slurm's variables
then.
"""

import os
import re
from collections.abc import MutableMapping

from xlstm_io.errors import ConfigError
from xlstm_io.rendezvous import rendezvous_port

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def first_host(nodes: str) -> str:
    """The first host of a list in Slurm's notation: `n3` of `n[3-5,9],m1`.

    Not by `scontrol show hostnames`, which is missing inside a container.
    """
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def tasks_per_node(counts: str) -> list[int]:
    """Tasks of each node from Slurm's notation: `[4, 4, 2]` of `4(x2),2`."""
    tasks: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        tasks += [int(count)] * int(times or 1)
    return tasks


def adopt_ranks(variables: MutableMapping[str, str] = os.environ) -> None:
    """Set torchrun's variables from those of a Slurm step with several tasks.

    Does nothing where a launcher has set them, and outside of such a step. An address or a port
    that is set already is kept.

    Args:
        variables: of the environment.

    Raises:
        ConfigError: some of the variables are set and others are not.
    """
    tasks = int(variables.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1 or all(name in variables for name in RANK_VARIABLES):
        return
    given = [name for name in RANK_VARIABLES if name in variables]
    if given:
        missing = [name for name in RANK_VARIABLES if name not in variables]
        raise ConfigError(
            f"{', '.join(given)} is set and {', '.join(missing)} is not, in one of {tasks} tasks "
            "of srun; set all of them, or none, and the ranks are those of Slurm"
        )
    turn = 100 * int(variables.get("SLURM_RESTART_COUNT", "0")) + int(variables["SLURM_STEP_ID"])
    local = tasks_per_node(variables["SLURM_STEP_TASKS_PER_NODE"])
    variables.update(
        RANK=variables["SLURM_PROCID"],
        WORLD_SIZE=str(tasks),
        LOCAL_RANK=variables["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(local[int(variables["SLURM_NODEID"])]),
    )
    variables.setdefault("MASTER_ADDR", first_host(variables["SLURM_STEP_NODELIST"]))
    port = rendezvous_port(int(variables["SLURM_JOB_ID"]), turn)
    variables.setdefault("MASTER_PORT", str(port))


def check_one_node(command: str) -> None:
    """Nothing where a command may start the workers of this machine.

    Args:
        command: its name, for the message.

    Raises:
        ConfigError: this process is in a Slurm job of several nodes, or one of several tasks that
            would each start all workers.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    in_job = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", in_job))
    if nodes > 1 or tasks > 1:
        raise ConfigError(
            f"{command} starts its workers on this machine alone, and this Slurm job has {nodes} "
            f"nodes and {tasks} tasks here; start one task per rank: srun --ntasks-per-node=N "
            f"python -m pretrain {'train' if command == 'launch' else command} RUN.yaml"
        )
