"""How the ranks that save and load together agree: every step succeeds on all of them or on none.

Saving happens in a thread of its own while the training loop runs collectives, so the two must not
share a process group. `background_ranks` makes a gloo group that nobody else uses, whatever the
training's backend is. Both kinds of collectives can then be under way at the same time in any
order.
"""

import datetime
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from xlstm_io.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointStorageError,
    Superseded,
    is_machine_failure,
)

#: How long a rank waits for the slowest one to write its file.
RANK_TIMEOUT = datetime.timedelta(hours=1)

T = TypeVar("T")


class Ranks:
    """The ranks of a process group, or this one process alone.

    Args:
        group: None means the default group where torch.distributed runs, else this process.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self._alone = group is None and not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if self._alone else dist.get_rank(group)
        self.size = 1 if self._alone else dist.get_world_size(group)

    @property
    def is_first(self) -> bool:
        """Whether this rank decides and writes what is written once."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value on the first rank; an empty list on the others."""
        if self._alone:
            return [value]
        values: list[Any] = [None] * self.size if self.is_first else []
        dist.gather_object(value, values or None, group=self.group, group_dst=0)
        return values

    def broadcast(self, value: T) -> T:
        """The first rank's value on every rank."""
        if self._alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def together(self, what: str, function: Callable[[], T], remedy: str = "") -> list[T]:
        """Call a function on every rank; if it raises on one, every rank raises.

        Args:
            what: What the function does, for the message: "saving the checkpoint of step 3".
            function: The function.
            remedy: End of the message.

        Returns:
            On the first rank the results by rank, elsewhere an empty list.

        Raises:
            CheckpointDamagedError: The checkpoint is damaged, as some rank found.
            CheckpointError: The cause is the file system or the checkpoint.
            CheckpointStorageError: The storage is full or fails, and the run may be repeated.
            Superseded: A newer life of the run has taken over.
            KeyboardInterrupt: Someone pressed Ctrl-C.
            RuntimeError: Anything else, which is a bug; the message holds the traceback.
        """
        try:
            mine: tuple[str, Any] = ("ok", function())
        except BaseException as error:  # every rank must hear of it, whatever it is
            mine = (_kind(error), _text(error))
        everyone = self.gather(mine)
        failures = [(rank, *found) for rank, found in enumerate(everyone) if found[0] != "ok"]
        failures = self.broadcast(failures)
        if not failures:
            return [result for _, result in everyone]
        kinds = {kind for _, kind, _ in failures}
        if "interrupt" in kinds:
            raise KeyboardInterrupt
        if "bug" in kinds:
            raise RuntimeError(
                "\n".join(f"{what} failed on rank {rank}\n{text}" for rank, _, text in failures)
            )
        rank, _, text = failures[0]
        if "superseded" in kinds:
            raise Superseded(text)
        where = ""
        if self.size > 1:
            several = f" on {len(failures)} ranks, first {rank}"
            where = f" on rank {rank}" if len(failures) == 1 else several
        kind = CheckpointError
        if "machine" in kinds:
            kind = CheckpointStorageError
        elif "damaged" in kinds:
            kind = CheckpointDamagedError
        raise kind(f"{what} failed{where}: {text}{remedy}")

    def first(self, what: str, function: Callable[[], T], remedy: str = "") -> T:
        """Call a function on the first rank; every rank gets its result, or its error.

        See `together` for the arguments and errors.
        """
        result: list[T] = []
        self.together(what, lambda: result.append(function()) if self.is_first else None, remedy)
        return self.broadcast(result)[0]


def background_ranks() -> Ranks:
    """All ranks, with a gloo group of their own; every rank must call it.

    Without torch.distributed this is the process alone.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.new_group(backend="gloo", timeout=RANK_TIMEOUT))


def _kind(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupt"
    if isinstance(error, Superseded):
        return "superseded"
    if isinstance(error, CheckpointDamagedError):
        return "damaged"
    if isinstance(error, OSError) and is_machine_failure(error):
        return "machine"
    return "user" if isinstance(error, OSError | CheckpointError) else "bug"


def _text(error: BaseException) -> str:
    if _kind(error) == "bug":
        return "".join(traceback.format_exception(error))
    return str(error)
