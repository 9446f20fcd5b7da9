"""What a process holds while it trains: memory, open files, threads."""

import os
from dataclasses import dataclass
from statistics import median

_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Held:
    """What a process holds at one moment.

    Attributes:
        memory: resident bytes.
        files: open files.
        threads: its threads.
    """

    memory: int
    files: int
    threads: int


def held_by(process: int) -> Held | None:
    """What a process holds now; None when it has ended."""
    folder = f"/proc/{process}"
    try:
        with open(f"{folder}/statm", encoding="ascii") as pages:
            memory = int(pages.read().split()[1]) * _PAGE
        return Held(memory, len(os.listdir(f"{folder}/fd")), len(os.listdir(f"{folder}/task")))
    except OSError:
        return None


@dataclass(frozen=True)
class Growth:
    """How what a process holds has changed over its life.

    Attributes:
        steps: the first step that counts, and the last one.
        memory: growth of the resident memory, as a share.
        files: open files in the first quarter of these steps, and in the last one.
        threads: the same of threads.
    """

    steps: tuple[int, int]
    memory: float
    files: tuple[int, int]
    threads: tuple[int, int]

    @property
    def is_flat(self) -> bool:
        """No growth of memory over 1 %, and files and threads as before."""
        same = self.files[1] <= self.files[0] and self.threads[1] <= self.threads[0]
        return same and self.memory <= 0.01


def growth(samples: list[tuple[int, Held]], settled: int) -> Growth | None:
    """Compare the first quarter of a life with its last one.

    Medians are compared: a thread that saves a checkpoint comes and goes.

    Args:
        samples: (finished steps of this life, what was held), in their order.
        settled: steps after which nothing may grow.

    Returns:
        None for a life that is too short to say.
    """
    counted = [(step, held) for step, held in samples if step >= settled]
    quarter = len(counted) // 4
    if quarter < 2:
        return None

    def ends(key: str) -> tuple[int, int]:
        values = [getattr(held, key) for _, held in counted]
        return int(median(values[:quarter])), int(median(values[-quarter:]))

    first, last = ends("memory")
    steps = counted[0][0], counted[-1][0]
    return Growth(steps, last / first - 1, ends("files"), ends("threads"))
