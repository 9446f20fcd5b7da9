"""What GPUs give a program, and programs that run at the same time. Nothing here needs a GPU."""

from typing import NamedTuple

# Architectures of consumers' and small GPUs: a program has about 99 KB of shared memory.
SMALL_SHARED = ("sm_86", "sm_87", "sm_89", "sm_120", "sm_121")


class Device(NamedTuple):
    """What programs that run at the same time share.

    Attributes:
        processors: Multiprocessors.
        shared: Bytes of shared memory that a program may have.
    """

    processors: int
    shared: int
