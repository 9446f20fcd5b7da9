"""A long run that is stopped and killed, and one that changes its layout, beside one left alone.

    python -m tests.long_runs.soak --work FOLDER [--steps 20000] [--deaths 30] [--layouts 10]

Four runs of a tiny model see the same samples. The first one is left alone: what its processes
hold must not grow. The second one is stopped or killed at random steps, one rank of it or all, and
must come to the same bits. The third one goes on on another layout at random steps, and must stay
within rounding of the first. The fourth one says what that is: it is left alone too, and adds its
gradients in another order. Training makes any difference grow, so the means over 50 steps of the
third one may part by 1e-3 nat, or by three times as much as those of the fourth.

`--minutes M` ends the command after so long, with exit code 75. Repeating it goes on where it was.
"""

import argparse
import json
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pretrain.supervision.progress_file import read_progress
from tests.data_prep.small_corpus import make_shards
from tests.dist.training_runs import TrainingRun, results, tiny_run
from tests.long_runs.resources import Growth, Held, growth, held_by
from tests.warm_python import start
from tests.warm_python.start import WarmPython
from xlstm_io.errors import ExitCode

WINDOW = 50
WITHIN = 1e-3  # nats
OTHER_SUMS = (2, {"data__micro_batch": 1})  # instead of 2 rows at a time
SETTLED = 1000  # steps after which memory must be flat
SILENCE_S = 300.0  # a run that does nothing for so long hangs
# How a rank may end when its life is ended: it has saved, could not hear a signal yet, was killed,
# or has lost another rank.
ENDS = {ExitCode.DONE, ExitCode.STOPPED, ExitCode.MACHINE_FAILED, -signal.SIGTERM, -signal.SIGKILL}
TP2 = {"layout__tensor": 2}
LAYOUTS: tuple[tuple[int, dict[str, Any]], ...] = (
    (2, {}),
    (2, TP2),
    (1, {}),
    (2, {"layout__pipeline": 2}),
    (2, {**TP2, "layout__sequence": True}),
    (2, {"layout__context": 2}),
    (4, TP2),
)


@dataclass(frozen=True)
class Death:
    """How a life of a run ends.

    Attributes:
        step: as soon as the run has finished this many steps.
        signal: SIGTERM stops it, SIGKILL ends it.
        rank: the rank that gets the signal; None for all of them.
        seconds: how much later, so that it also comes amid a step or a save.
    """

    step: int
    signal: int
    rank: int | None = None
    seconds: float = 0.0


def draw_deaths(count: int, steps: int, seed: int, kinds: Sequence[int]) -> list[Death]:
    """So many deaths at random steps, in their order."""
    rng = random.Random(seed)
    return [
        Death(step, rng.choice(kinds), rng.choice((None, 0, 1)), rng.uniform(0, 0.05))
        for step in sorted(rng.choices(range(1, steps), k=count))
    ]


class OutOfTime(Exception):
    """The time that the command was given is over."""


class LongRun:
    """A run, all its lives and what ends them.

    Args:
        folder: of the run; the file beside it with the suffix `.jsonl` gets a line for each life.
        data: shards.
        deaths: how its lives end, in their order.
        layouts: (ranks, changes to the configuration) of its lives, in turn.
        steps: of the run.
    """

    def __init__(
        self,
        folder: Path,
        data: Path,
        steps: int,
        deaths: Sequence[Death] = (),
        layouts: Sequence[tuple[int, dict[str, Any]]] = LAYOUTS[:1],
    ) -> None:
        self.folder, self.data, self.deaths, self.layouts = folder, data, deaths, layouts
        self.steps, self.settled = steps, min(SETTLED, steps // 4)
        self._lives = folder.with_suffix(".jsonl")
        self._log = folder.with_suffix(".log")

    def lives(self) -> list[dict[str, Any]]:
        """What is known of the lives so far."""
        if not self._lives.exists():
            return []
        return [json.loads(line) for line in self._lives.read_text().splitlines()]

    def died(self) -> int:
        """How many of the deaths have come."""
        return sum(life["death"] is not None for life in self.lives())

    def finish(self, python: WarmPython, end: float) -> None:
        """Run until the last step.

        Args:
            python: where processes come from.
            end: when to stop, by the monotonic clock.

        Raises:
            OutOfTime: the run has saved and can go on.
        """
        while not self._done():
            died = self.died()
            death = self.deaths[died] if died < len(self.deaths) else None
            ranks, changes = self.layouts[died % len(self.layouts)]
            raw = tiny_run(
                self.folder,
                self.data,
                run__steps=self.steps,
                model__pattern="Ms",
                checkpoint__interval=50,
                # What the first evaluation opens stays open: it comes before anything is compared.
                evaluation__interval=max(1, self.settled // 2),
                **changes,
            )
            life = _Life(TrainingRun(python, raw, ranks, self._log), self.folder)
            came = life.watch(death, end)
            grown = [growth(samples, self.settled) for samples in life.samples]
            line = {
                "ranks": ranks,
                "changes": changes,
                "death": asdict(death) if death is not None and came else None,
                "step": _steps_of(self.folder),
                "codes": life.codes,
                "growth": [asdict(one) for one in grown if one is not None],
            }
            with self._lives.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
            out_of_time = time.monotonic() > end
            if not set(life.codes) <= (ENDS if came or out_of_time else {ExitCode.DONE}):
                raise AssertionError(f"{self.folder.name}: {life.codes}; see {self._log}")
            if out_of_time and not self._done():
                raise OutOfTime

    def growths(self) -> list[Growth]:
        """How what each process held has changed, for lives that were long enough."""
        return [
            Growth(**{k: tuple(v) if isinstance(v, list) else v for k, v in one.items()})
            for life in self.lives()
            for one in life["growth"]
        ]

    def _done(self) -> bool:
        progress = read_progress(self.folder)
        return progress is not None and progress.status == "done"


class _Life:
    """One life of a run while it lasts."""

    def __init__(self, run: TrainingRun, folder: Path) -> None:
        self._run, self._folder = run, folder
        self.samples: list[list[tuple[int, Held]]] = [[] for _ in run.processes]
        self.codes: list[int | None] = []

    def watch(self, death: Death | None, end: float) -> bool:
        """Wait for the life's end; whether it was that death."""
        began, moved, last = _steps_of(self._folder), time.monotonic(), -1
        came, sent = False, False
        while self._run.running:
            time.sleep(0.02)
            step, now = _steps_of(self._folder), time.monotonic()
            if step != last:
                moved, last = now, step
                for process, samples in zip(self._run.processes, self.samples, strict=True):
                    held = held_by(process.pid)
                    if held is not None:
                        samples.append((step - began, held))
            if now - moved > SILENCE_S:
                self._run.kill(random.Random(0))
                raise AssertionError(f"{self._folder}: no step for {SILENCE_S:.0f} s at {step}")
            if not sent and death is not None and step >= death.step:
                time.sleep(death.seconds)
                for rank, process in enumerate(self._run.processes):
                    if death.rank in (None, rank) or len(self._run.processes) == 1:
                        process.send_signal(death.signal)
                came = sent = True
            elif not sent and now > end:
                for process in self._run.processes:
                    process.send_signal(signal.SIGTERM)
                sent = True
        self._run.wait(SILENCE_S)
        # At its start a rank waits seconds for one that is gone. This ends it, as `launch` would.
        self._run.kill(random.Random(0))
        self.codes = [process.poll() for process in self._run.processes]
        return came


def _steps_of(folder: Path) -> int:
    progress = read_progress(folder)
    return 0 if progress is None else progress.step


def farthest_window(one: Path, other: Path) -> float:
    """How far the means of two runs' losses over windows of 50 steps part at most, in nats."""
    losses = [[loss for loss, _ in results(folder)[0].values()] for folder in (one, other)]
    return max(
        abs(fmean(losses[0][at : at + WINDOW]) - fmean(losses[1][at : at + WINDOW]))
        for at in range(0, len(losses[0]), WINDOW)
    )


def describe(name: str, run: LongRun) -> str:
    """Lives, deaths, and what processes held, in two lines."""
    lives = run.lives()
    signals = [life["death"]["signal"] for life in lives if life["death"]]
    kills = signals.count(signal.SIGKILL)
    line = f"{name}: {run.steps} steps in {_number(len(lives), 'life', 'lives')}"
    if signals:
        stops = _number(len(signals) - kills, "stop", "stops")
        line += f", {stops} and {_number(kills, 'kill', 'kills')}"
    grown = run.growths()
    if grown:
        worst = max(grown, key=lambda one: one.memory)
        files = max(one.files[1] - one.files[0] for one in grown)
        threads = max(one.threads[1] - one.threads[0] for one in grown)
        line += (
            f"\n  {_number(len(grown), 'process', 'processes')} after step {worst.steps[0]} of "
            f"their lives: memory {worst.memory:+.2%} at most, open files {files:+d}, "
            f"threads {threads:+d}"
        )
    return line


def _number(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def soak(
    python: WarmPython,
    work: Path,
    steps: int,
    deaths: int,
    layouts: int,
    end: float = float("inf"),
) -> bool:
    """Finish the four runs and say how they compare; whether all is as it must be.

    Args:
        python: where processes come from.
        work: a folder that keeps everything.
        steps: of each run.
        deaths: of the second run.
        layouts: changes of the third run's layout.
        end: when to stop, by the monotonic clock.

    Raises:
        OutOfTime: it can go on.
    """
    work.mkdir(parents=True, exist_ok=True)
    data = work / "data"
    if not (data / "shards" / "manifest.json").exists():
        data.mkdir(exist_ok=True)
        make_shards(data)
    shards, both = data / "shards", (signal.SIGTERM, signal.SIGKILL)
    changes = draw_deaths(layouts, steps, 2, (signal.SIGTERM,))
    alone = LongRun(work / "alone", shards, steps)
    disturbed = LongRun(work / "disturbed", shards, steps, draw_deaths(deaths, steps, 1, both))
    moved = LongRun(work / "moved", shards, steps, changes, LAYOUTS)
    control = LongRun(work / "control", shards, steps, layouts=[OTHER_SUMS])
    runs = alone, disturbed, moved, control
    for run in runs:
        run.finish(python, end)
    equal = results(alone.folder) == results(disturbed.folder)
    apart, rounding = (farthest_window(alone.folder, run.folder) for run in (moved, control))
    flat = all(one.is_flat for run in runs for one in run.growths())
    print(describe("left alone", alone))
    print(describe("stopped and killed", disturbed))
    print(f"  losses, gradient norms and the last checkpoint are {'' if equal else 'NOT '}the same")
    print(describe("on other layouts", moved))
    print(
        f"  means over {WINDOW} steps are at most {apart:.1e} nat apart, "
        f"and {rounding:.1e} by another order of sums"
    )
    return equal and flat and apart < max(WITHIN, 3 * rounding)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; its exit code is 0 when everything is as it must be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder that keeps everything")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--deaths", type=int, default=30, help="random stops and kills")
    parser.add_argument("--layouts", type=int, default=10, help="changes of the layout")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    asked = parser.parse_args(words)
    end = time.monotonic() + 60 * asked.minutes
    try:
        with start.start() as python:
            right = soak(
                python, asked.work.resolve(), asked.steps, asked.deaths, asked.layouts, end
            )
    except OutOfTime:
        print("stopped: repeat the command to go on")
        return ExitCode.STOPPED
    return ExitCode.DONE if right else ExitCode.REFUTED


if __name__ == "__main__":
    sys.exit(main())
