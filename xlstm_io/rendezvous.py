"""The port on which the ranks of a Slurm job meet.

The standard library alone: the batch script asks too, on hosts that have nothing else.
"""

# Below the ports that Linux gives to clients (from 32768), where any of them may be in use.
FIRST_PORT, PORTS = 20000, 12000


def rendezvous_port(job: int, turn: int) -> int:
    """A port for a start of a job's ranks, another one for every turn.

    Args:
        job: Slurm's number of the job.
        turn: counts the starts within that job.
    """
    return FIRST_PORT + (job + 37 * turn) % PORTS
