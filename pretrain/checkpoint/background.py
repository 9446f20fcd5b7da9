"""Saving while training goes on.

`CheckpointSaver.save` copies this rank's slices to host memory and returns. It runs no collective,
serialises nothing and opens no file. A thread then writes the copy, hashes and syncs it, and agrees
with the other ranks' threads (`pretrain.checkpoint.ranks`). Writing, hashing and copying release
Python's lock, so the training loop keeps its pace. The copy's memory is kept for the next save: on
a GPU it is pinned, and both pinning and first touching memory cost more than the copy itself. So
`CheckpointSaver.prepare` takes it in a thread when training starts.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pretrain.checkpoint.host_copy import HostCopy
from pretrain.checkpoint.ranks import Ranks, background_ranks
from pretrain.checkpoint.retention import Known, Retention, apply_retention
from pretrain.checkpoint.save import write_checkpoint
from xlstm_io.checkpoint.evaluation import Evaluation, write_evaluation
from xlstm_io.checkpoint.manifest import MANIFEST_NAME, step_of_folder
from xlstm_io.checkpoint.reader import TensorSlice
from xlstm_io.errors import CheckpointError, Superseded, UserError
from xlstm_io.storage import Location, exists, location, make_folder, remove_folder, write_atomic

log = logging.getLogger(__name__)

# How long a failing process waits for a save that is under way. If another rank is gone, that save
# never finishes.
EXIT_WAIT_S = 5.0


@dataclass(frozen=True)
class FinishedSave:
    """A checkpoint that is complete.

    Attributes:
        path: Its folder.
        stall: Seconds for which the training loop stood still.
        seconds: Seconds from the call of `save` until it was complete.
    """

    path: Location
    stall: float
    seconds: float


class CheckpointSaver:
    """Saves checkpoints of a run; every rank has one and calls the same methods at the same steps.

    Use it as a context manager around the training loop. Leaving it waits for a save under way,
    unless the loop failed for a reason that may have taken another rank away.

    Args:
        folder: Where the checkpoints lie, a path or an fsspec URL.
        retention: Which checkpoints stay (default: all).
        asynchronous: Write in a thread. Otherwise `save` returns when the checkpoint is complete.
        files: Small files that every checkpoint holds, see `save_checkpoint`.
        ranks: Who saves together (default: all, through a process group that is made here, so all
            ranks must construct one together). While a save is under way, nothing else may use it.
        fence: Called on the first rank before a checkpoint is made complete, and before old ones
            are deleted. It raises Superseded when this process may no longer write.
        waiting: Called before the training loop, or an error that ends it, waits for a save.

    Attributes:
        last_good: The newest complete checkpoint that this process knows.
        damaged: Checkpoints found damaged while resuming; retention leaves them alone.
        onset: Step at which the loss began to spike; retention keeps a checkpoint from before.
    """

    def __init__(
        self,
        folder: Location | str,
        *,
        retention: Retention | None = None,
        asynchronous: bool = True,
        files: Mapping[str, bytes] | None = None,
        ranks: Ranks | None = None,
        fence: Callable[[], None] = lambda: None,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = location(folder)
        self.ranks = ranks or background_ranks()
        self.last_good: Location | None = None
        self.damaged: set[Location] = set()
        self.onset: int | None = None
        self._retention = retention or Retention()
        self._asynchronous = asynchronous
        self._files = files
        self._fence, self._waiting = fence, waiting
        self._known: Known = {}
        self._host_copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._finished: FinishedSave | None = None

    def check_writable(self) -> None:
        """Make and remove a folder with an empty file, on every rank, as a save does.

        A run that found out at its first save would have lost the steps until then.

        Raises:
            CheckpointError: A rank cannot write there.
        """

        def try_out() -> None:
            attempt = self.folder / f".write-test-{self.ranks.rank}-{secrets.token_hex(4)}"
            make_folder(attempt)
            write_atomic(attempt / "file", b"", make_parents=False)
            remove_folder(attempt)

        what, remedy = f"writing to {self.folder}", "; use another checkpoint.dir, or run.dir"
        self.ranks.together(what, try_out, remedy)

    def prepare(self, slices: Sequence[TensorSlice]) -> None:
        """Take the host memory for saves of these slices now, in a thread, and not at the first."""
        if self._asynchronous:
            self._host_copy.prepare(slices)

    def save(
        self,
        slices: Sequence[TensorSlice],
        state: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        step: int,
    ) -> float:
        """Save the state as it is now; see `save_checkpoint` for the arguments.

        It waits for an earlier save first. `take_finished` tells when this one is complete.

        Returns:
            The seconds for which the caller waited here.

        Raises:
            CheckpointError: The earlier save failed, or, if not asynchronous, this one.
        """
        started = time.perf_counter()
        self.wait()
        if not self._asynchronous:
            self._write(slices, state, config, step, started, None)
            self.wait()
            return time.perf_counter() - started
        copies = self._host_copy.take(slices)
        stall = time.perf_counter() - started
        self._thread = threading.Thread(
            target=self._write,
            args=(copies, state, config, step, started, stall),
            name=f"save-step-{step}",
            daemon=True,  # a failing process must be able to leave; see __exit__
        )
        self._thread.start()
        return stall

    def record(self, evaluation: Evaluation) -> None:
        """Write what was measured at a step beside that step's checkpoint, when it is complete.

        Waits for nothing: the file is written in the background, after a save under way. Where the
        step has no checkpoint, nothing is written. A loss that cannot be written is named in a
        warning, and the step stays unmeasured.
        """
        if not self.ranks.is_first:
            return
        save = self._thread

        def write() -> None:
            if save is not None:
                save.join()
            self._record(evaluation)

        if self._asynchronous:
            self._thread = threading.Thread(target=write, name="evaluation", daemon=True)
            self._thread.start()
        else:
            write()

    @property
    def failed(self) -> bool:
        """Whether a background save has failed, as far as this rank knows by now.

        Ranks learn it at different moments. They must agree before one acts on it (the
        trainer votes with each step's verdict); then all call `wait`, which raises on all of them.
        """
        return self._error is not None

    def wait(self) -> None:
        """Wait for the save under way.

        Raises:
            CheckpointError: It failed; the same error on every rank.
        """
        self._waiting()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if isinstance(error, CheckpointError):
            good = "there is no checkpoint yet"
            if self.last_good is not None:
                good = f"the last good checkpoint is {self.last_good}"
            raise type(error)(f"{error}; {good}") from error
        if error is not None:
            raise error

    def take_finished(self) -> FinishedSave | None:
        """The save that was completed since the last call, if any; each is returned once."""
        finished, self._finished = self._finished, None
        return finished

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._waiting()
            # All ranks raise these together, so all are there to finish the save.
            together = issubclass(kind, UserError | Superseded)
            self._thread.join(None if together else EXIT_WAIT_S)
            if self._error is not None:
                log.warning("the last save failed too: %s", self._error)

    def _write(
        self,
        slices: Sequence[TensorSlice],
        state: Mapping[str, Any],
        config: Mapping[str, Any],
        step: int,
        started: float,
        stall: float | None,
    ) -> None:
        """Write and agree; keeps the outcome for the training loop."""
        self._notice_removal()
        try:
            path = write_checkpoint(
                self.folder,
                slices,
                state,
                config,
                step=step,
                files=self._files,
                ranks=self.ranks,
                fence=self._fence,
            )
        except BaseException as error:  # raised by `wait`, whatever it is
            self._error = error
            return
        self.last_good = path
        if self.ranks.is_first:
            try:
                self._fence()
                self._retain(path)
            except Superseded:  # the next save tells all ranks
                pass
            except OSError as error:
                log.warning(
                    "old checkpoints in %s stay until the next save: %s", path.parent, error
                )
        seconds = time.perf_counter() - started
        self._finished = FinishedSave(path, seconds if stall is None else stall, seconds)

    def _retain(self, just_saved: Location) -> None:
        apply_retention(
            self.folder, self._retention, just_saved, self.damaged, self.onset, self._known
        )

    def _notice_removal(self) -> None:
        """Say it when somebody has removed the newest checkpoint while the run was at work."""
        good = self.last_good
        if good is None or not self.ranks.is_first:
            return
        with suppress(OSError):  # the save that follows says what is wrong with the storage
            if not exists(good / MANIFEST_NAME):
                log.warning("the checkpoint %s is gone: somebody has removed or moved it", good)

    def _record(self, evaluation: Evaluation) -> None:
        """On the first rank: `evaluation.json`, and then what stays by the new loss."""
        path = self.last_good
        if self._error is not None or path is None or step_of_folder(path) != evaluation.step:
            return
        try:
            self._fence()
            write_evaluation(path, evaluation)
            self._known.pop(path, None)  # its loss is to be read
            self._retain(path)
        except Superseded:  # the next save tells all ranks
            return
        except (OSError, CheckpointError) as error:
            log.warning("could not write the validation loss into %s: %s", path, error)
