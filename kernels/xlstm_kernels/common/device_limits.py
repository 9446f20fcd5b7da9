"""What bounds a launch whose programs run at the same time. Nothing here needs a GPU."""

from typing import NamedTuple


class Device(NamedTuple):
    """What programs that run at the same time share.

    Attributes:
        processors: Multiprocessors.
        shared: Bytes of shared memory that a program may have.
    """

    processors: int
    shared: int
