"""What the training loop costs around the model: the CPU demo's run, on random tokens.

    python -m benchmarks.trainer_overhead [--steps 60] [--replicas] [--quick]

The demo's own configuration (pretrain/configs/cpu_demo.yaml: two processes, logging and TensorBoard
as there) trains through `pretrain.trainer.Trainer`; rank 0 times each part of the loop. The model
is `engine.forward_backward`, `engine.gradient_norm` and `engine.step`. Everything else between two
steps' starts is overhead: loader, verdict (with the wait for the other rank), logging, the stall of
a checkpoint, the check of the replicas, and what is left. A part's cost per step is its median
where it happens times how often it happens; checkpoints and checks are made more often here, to
have several, and count as often as in the demo. The writing of checkpoints in the background is not
in it, and slows the model's steps that it meets.

The demo's two processes share its tensors. With `--replicas` each holds the whole model, and a step
has one micro-batch. That is where the check of the replicas costs most: it reads all weights, and
its three forward passes are as much work as a step.

Goals: at most 3 % of a step, and at most 0.2 % for the check.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.loader.synthetic_shards import write_shards
from pretrain.commands.run.launch import run_workers
from pretrain.config import RunConfig, load_config

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "pretrain" / "configs" / "cpu_demo.yaml"
GOAL = 0.03
CHECK_GOAL = 0.002
WARM_UP = 3  # steps that allocate and compile
TIMES_FILE = "times.json"
CHECK = "check of the replicas"
MODEL = ("forward_backward", "gradient norm", "optimizer")
QUICK = {
    "model.pattern": "M",
    "model.hidden_size": 32,
    "model.vocab_size": 128,
    "data.seq_len": 32,
}


class Clock:
    """Seconds of the named parts of every step; a part inside another one is the outer's."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._started = 0.0
        self._inside = False

    def start_step(self) -> None:
        """End the running step and begin the next."""
        self.stop()
        self.steps.append(defaultdict(float))

    def stop(self) -> None:
        """End the running step."""
        now = time.perf_counter()
        if self.steps and "step" not in self.steps[-1]:
            self.steps[-1]["step"] = now - self._started
        self._started = now

    def timed(self, part: str, function: Callable) -> Callable:
        """The function, its seconds added to a part of the running step."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside or not self.steps:
                return function(*args, **kwargs)
            self._inside, started = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.steps[-1][part] += time.perf_counter() - started
                self._inside = False

        return call


def worker(config: RunConfig) -> int:
    """Train as the trainer does, one rank of the run; rank 0 writes the seconds of every step."""
    from pretrain import layout as layouts
    from pretrain.data import TrainLoader
    from pretrain.engines.verdict import Guard
    from pretrain.guard.replicas import ReplicaWatcher
    from pretrain.trainer import Trainer
    from pretrain.watching.metrics import MetricLogger
    from xlstm_io.signals import StopSignal

    clock = Clock()
    with StopSignal() as stop, contextlib.closing(layouts.start(config)) as layout:
        trainer = Trainer(config, layout, stop)

        def step(*arguments: Any, of: Callable = trainer._step) -> tuple[bool, ...]:
            clock.start_step()
            return of(*arguments)

        def evaluate(metrics: MetricLogger, of: Callable = trainer._evaluate) -> bool:
            clock.stop()  # validation is the model's work, and only the last step is followed by it
            return of(metrics)

        parts = {
            (trainer.engine, "forward_backward"): "forward_backward",
            (trainer.engine, "gradient_norm"): "gradient norm",
            (trainer.engine, "step"): "optimizer",
            (TrainLoader, "__next__"): "loader",
            (Guard, "judge"): "verdict",
            (MetricLogger, "log"): "logging",
            (trainer, "_save"): "checkpoint stall",
            (ReplicaWatcher, "before_update"): CHECK,
            (ReplicaWatcher, "tell"): CHECK,
        }
        for (owner, name), part in parts.items():
            setattr(owner, name, clock.timed(part, getattr(owner, name)))
        trainer._step, trainer._evaluate = step, evaluate
        code = trainer.train()
        if layout.is_main:
            Path(config.run.dir, TIMES_FILE).write_text(json.dumps(clock.steps), encoding="utf-8")
    return code


def summarize(
    steps: Sequence[dict[str, float]], intervals: dict[str, int]
) -> tuple[float, dict[str, float]]:
    """(median seconds of a step with neither checkpoint nor check, each part's seconds per step).

    intervals: steps between two of the parts that are rare, in the run that the figures are for.
    """
    steps = [s | {"other": 2 * s["step"] - sum(s.values())} for s in steps[WARM_UP:]]
    ordinary = [s for s in steps if not intervals.keys() & s]
    costs = {}
    for part in dict.fromkeys(part for step in steps for part in step):
        if part in intervals:
            rate = 1 / intervals[part]
        else:
            rate = sum(part in step for step in ordinary) / len(ordinary)
        chosen = steps if part in intervals else ordinary
        costs[part] = rate * statistics.median([s[part] for s in chosen if part in s] or [0.0])
    return costs.pop("step"), costs


def report(whole: float, costs: dict[str, float], steps: int) -> str:
    """The table."""
    around = {part: seconds for part, seconds in costs.items() if part not in MODEL}
    share = sum(around.values()) / whole
    lines = [f"a step takes {whole * 1e3:.1f} ms, median of {steps} steps; per step:"]
    for part, seconds in costs.items():
        lines.append(f"  {part:<22}{seconds * 1e3:>9.3f} ms  {seconds / whole:>7.2%}")
    check = costs.get(CHECK, 0.0) / whole
    for what, part, goal in ((CHECK, check, CHECK_GOAL), ("around the model", share, GOAL)):
        verdict = "met" if part <= goal else "MISSED"
        lines.append(f"{what}: {part:.2%} of a step (goal {100 * goal:g}%: {verdict})")
    return "\n".join(lines)


def measure(
    folder: Path, steps: int, quick: bool, replicas: bool
) -> tuple[float, dict[str, float]]:
    """Train in a folder; see `summarize`."""
    demo = load_config(DEMO)
    changes = {
        "run.dir": str(folder / "run"),
        "run.steps": steps,
        "data.path": str(folder / "shards"),
        "schedule.warmup_steps": 1,
        "checkpoint.interval": 7,  # not always at a logged step
        "guard.check_replicas": 6,
        "evaluation.interval": steps,
        "evaluation.max_batches": 1,
        **(QUICK if quick else {}),
        **({"layout.tensor": 1, "layout.sequence": "false"} if replicas else {}),
    }
    config = load_config(DEMO, changes)
    rows = steps * config.data.global_batch
    write_shards(
        folder / "shards",
        {"random": [rows]},
        seq_len=config.data.seq_len,
        vocab_size=config.model.vocab_size,
        valid_rows=config.data.global_batch,
    )
    words = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "benchmarks.trainer_overhead", "--worker", *words]
    code = run_workers(command, demo.layout.tensor, folder / "run" / "logs")
    if code:
        raise SystemExit(f"the run ended with {code}; see above")
    times = json.loads((folder / "run" / TIMES_FILE).read_text(encoding="utf-8"))
    intervals = {"checkpoint stall": demo.checkpoint.interval, CHECK: demo.guard.check_replicas}
    return summarize(times, intervals)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--replicas", action="store_true", help="each process has a whole model")
    parser.add_argument("--quick", action="store_true", help="a tiny model: proves that it runs")
    parser.add_argument("--worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return worker(load_config(DEMO, options.worker))
    if options.steps <= WARM_UP + 5:
        parser.error(f"--steps {options.steps} is too few; use {WARM_UP + 6} or more")
    with tempfile.TemporaryDirectory() as folder:
        whole, costs = measure(Path(folder), options.steps, options.quick, options.replicas)
    print(report(whole, costs, options.steps - WARM_UP))
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    return 0


if __name__ == "__main__":
    sys.exit(main())
