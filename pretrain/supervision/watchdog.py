"""Notices that a process no longer moves, says where it stands, and ends it.

A hang is silent: one rank waits for another that was stopped, lost its network or runs other code,
and the process group's own limit is half an hour or more. So every rank has a thread that knows the
phase the rank is in and when it last moved on. Without progress for the phase's limit it writes the
Python stacks of all threads to `logs/hang-RANK.txt` and ends the process with exit code 74; whoever
started it ends the rest. The last collectives go beside it, as torch's flight recorder has them
(`torch.distributed.flight_recorder` reads it). `logs/phase-RANK.json` says in which phase and at
which step each rank was last, so that the ranks that are missing can be named. Within a phase it is
written once a minute: a thousand ranks would replace hundreds of files a second otherwise, for as
long as the run lasts. Under a limit of less than two minutes it is written twice in that time: the
first rank that ends has the others ended too, and what they have noted must be where they stand.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pretrain.config import GuardConfig
from xlstm_io.errors import ExitCode
from xlstm_io.storage import write_atomic

STEP, STARTUP, EVALUATION, CHECKPOINT = "step", "start-up", "evaluation", "checkpoint"
TICK_S = 5.0
NOTE_S = 60.0  # between two notes of one phase
STOPPED_S = 60.0  # a look that comes so late: the process was stopped, as by `scontrol suspend`
RECORDER_S = 10.0  # for the flight recorder to answer
# Without a limit of the user's, a step may take so many times the median of the recent ones. One
# long wait for the storage does not move the median.
SHORTEST_S, MEDIAN_STEPS, RECENT_STEPS = 600.0, 20, 15
# What raises the limit of each phase.
KEYS = {
    STEP: "guard.hang_timeout",
    STARTUP: "guard.startup_timeout",
    EVALUATION: "guard.evaluation_timeout",
    CHECKPOINT: "guard.checkpoint_timeout",
}


@dataclass(frozen=True)
class Limits:
    """Seconds without progress after which a rank counts as hanging.

    Attributes:
        step: one optimizer step; None for `SHORTEST_S`, or `MEDIAN_STEPS` times the median of the
            recent steps where that is more.
        startup: imports, meeting the other ranks, building and loading the model. Until the first
            step is done no limit is below it.
        checkpoint: waiting for a checkpoint that must be complete.
        evaluation: one batch of an evaluation; None for the limit of a step.
    """

    step: float | None
    startup: float
    checkpoint: float
    evaluation: float | None = None

    @classmethod
    def from_config(cls, guard: GuardConfig) -> "Limits | None":
        """The limits of a run; None where it is not to be watched."""
        if guard.hang_timeout == 0:
            return None
        return cls(
            guard.hang_timeout,
            guard.startup_timeout,
            guard.checkpoint_timeout,
            guard.evaluation_timeout,
        )

    def of(self, phase: str, median: float) -> float:
        """The limit of a phase, given the median of the recent steps in seconds."""
        if phase == STARTUP:
            return self.startup
        if phase == CHECKPOINT:
            return self.checkpoint
        if phase == EVALUATION and self.evaluation is not None:
            return self.evaluation
        return max(SHORTEST_S, MEDIAN_STEPS * median) if self.step is None else self.step


class Watchdog:
    """Watches one rank from a thread of its own, while it is used as a context manager.

    Args:
        folder: where the files go, `RUN/logs`.
        rank: of this process.
        limits: see there; None watches nothing but still keeps the phase file.
        end: called with the exit code, for tests; the process ends at once by default.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        limits: Limits | None,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._folder, self._rank, self._limits, self._end = folder, rank, limits, end
        # Phase, step, since when, and whether a step has begun yet. It is replaced as a whole, so
        # no lock is needed.
        self._state = (STARTUP, 0, time.monotonic(), False)
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._median = 0.0
        self._written: tuple[str, int] | None = None
        self._noted, self._note_s = 0.0, NOTE_S
        self._waits_for: Callable[[], str] = str
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def moved(self, phase: str, step: int) -> None:
        """This rank has made progress: it now begins `phase`, with `step` steps behind it."""
        before, done, since, stepped = self._state
        now = time.monotonic()
        if before == STEP == phase and step > done:
            self._recent.append(now - since)
            self._median = sorted(self._recent)[len(self._recent) // 2]
        self._state = (phase, step, now, stepped or phase == STEP)

    def ask(self, waits_for: Callable[[], str]) -> None:
        """Ask this, from the watchdog's thread, what a rank that stands still is waiting for.

        Args:
            waits_for: half a sentence for the message; empty where it does not know.
        """
        self._waits_for = waits_for

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        tick = TICK_S
        if self._limits is not None:
            limits = [self._limits.step or SHORTEST_S]
            limits += [self._limits.evaluation] if self._limits.evaluation else []
            tick = min(tick, min(limits) / 4)
            self._note_s = min(NOTE_S, min(limits) / 2)
        looked = woke = time.monotonic()
        while True:
            now = time.monotonic()  # read first: progress that comes between counts
            if now - looked > tick + STOPPED_S:
                woke = now
            looked = now
            phase, step, since, stepped = self._state
            self._note(phase, step, now)
            if self._limits is not None:
                limit, key = self._limits.of(phase, self._median), KEYS[phase]
                # An evaluation that comes first compiles and connects too.
                if not stepped and limit < self._limits.startup:
                    limit, key = self._limits.startup, KEYS[STARTUP]
                silent = now - max(since, woke)
                if silent > limit:
                    self._note(phase, step, now, last=True)
                    self._report(phase, step, silent, f"{limit:.0f} s, {key}")
                    self._end(ExitCode.HANG)
                    return
            if self._stop.wait(tick):
                return

    def _note(self, phase: str, step: int, now: float, last: bool = False) -> None:
        """Keep `phase-RANK.json` current; a full disk does not stop the watching."""
        goes_on = self._written is not None and self._written[0] == phase and not last
        if self._written == (phase, step) or (goes_on and now - self._noted < self._note_s):
            return
        data = json.dumps({"rank": self._rank, "phase": phase, "step": step}).encode()
        with suppress(OSError):
            write_atomic(self._folder / f"phase-{self._rank}.json", data, sync=False)
            self._written, self._noted = (phase, step), now

    def _report(self, phase: str, step: int, silent: float, limit: str) -> None:
        path = self._folder / f"hang-{self._rank}.txt"
        words = (
            f"rank {self._rank} has made no progress for {silent:.0f} s (limit {limit}) in its "
            f"{phase}, after step {step}"
        )
        waits_for = self._waits_for()
        if waits_for:
            words += f": it waits for {waits_for}"
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                file.write(f"{words}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        # In a thread: the recorder belongs to libraries that may be what hangs.
        recorder = threading.Thread(target=self._dump_collectives, daemon=True)
        recorder.start()
        recorder.join(RECORDER_S)
        with suppress(OSError):
            os.write(sys.stderr.fileno(), f"error: {words}; its stacks are in {path}\n".encode())

    def _dump_collectives(self) -> None:
        """`hang-nccl-RANK` from NCCL's recorder, which has not been seen on a GPU.

        torch's `torchfrtrace --prefix hang-nccl-` reads names that end in the rank.
        """
        torch = sys.modules.get("torch")
        if torch is None or not torch.distributed.is_initialized():
            return
        recorders = torch._C._distributed_c10d
        for name in ("_dump_nccl_trace", "_dump_fr_trace"):  # of NCCL, of every other backend
            dump = getattr(recorders, name, None)
            if dump is not None:
                kind = name.removeprefix("_dump_").removesuffix("_trace")
                with suppress(OSError, RuntimeError):
                    path = self._folder / f"hang-{kind}-{self._rank}"
                    recorded = dump()
                    if recorded:  # None where no collective has been recorded yet
                        write_atomic(path, recorded, sync=False)


def last_phases(folder: Path) -> list[str]:
    """Where each rank was last, one line per rank, from the files in `RUN/logs`."""
    found = []
    for path in folder.glob("phase-*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            about = json.loads(path.read_bytes())
            found.append((int(about["rank"]), str(about["phase"]), int(about["step"])))
    return [
        f"rank {rank} was last seen in its {phase}, after step {step}"
        for rank, phase, step in sorted(found)
    ]
