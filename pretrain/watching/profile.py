"""A profile of a few steps, where `logging.profile.from_step` asks for it.

    RUN/profile/step-00000100/rank_0.json.gz   a trace, for ui.perfetto.dev or chrome://tracing
    RUN/profile/step-00000100/rank_0.txt       operations by their own time

Everything from the first of the steps to the end of the last one is in it, also what lies between
steps. The profiler itself costs time, so the speed of these steps is not the run's.
"""

import os
from pathlib import Path
from typing import Any, Self

import torch

from pretrain.config import RunConfig
from pretrain.layout import Layout
from pretrain.run_folder import PROFILE_FOLDER
from pretrain.watching.metrics import MetricLogger
from pretrain.watching.watcher import StepWatcher, WatchedStep

ROWS = 60  # of the table


class ProfileWatcher(StepWatcher):
    """Profiles the steps from `from_step` on, on every rank.

    Args:
        config: the run.
        layout: where this process stands.
        start_step: finished steps of the run when this life begins.
    """

    def __init__(self, config: RunConfig, layout: Layout, start_step: int) -> None:
        options = config.logging.profile
        first = options.from_step
        # A life that begins in the middle of the span would profile a part of it.
        self._steps = range(0)
        if first is not None and start_step < first:
            self._steps = range(first, first + options.steps)
        self._layout = layout
        self._folder = Path(config.run.dir) / PROFILE_FOLDER
        self._profiler: Any = None

    def due(self, step: int) -> bool:
        """Whether the step after which `step` steps are finished is profiled."""
        return step in self._steps

    def __enter__(self) -> Self:
        if self._profiler is None:
            if self._layout.device.type == "cpu":
                # Its log level: nothing. On the CPU it has only to say that it starts and ends.
                os.environ.setdefault("KINETO_LOG_LEVEL", "6")
            activities = torch.profiler.supported_activities()
            self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
            self._profiler.start()
        return self

    def tell(self, seen: WatchedStep, metrics: MetricLogger) -> None:
        """After the last of the steps, write trace and table."""
        if seen.step != self._steps[-1]:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        first, last = self._steps[0], self._steps[-1]
        folder = self._folder / f"step-{first:08d}"
        name = f"rank_{self._layout.rank}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"{name}.json.gz"))
            averages = profiler.key_averages()
            on_device = self._layout.device.type != "cpu"
            order = "self_device_time_total" if on_device else "self_cpu_time_total"
            table = averages.table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
            (folder / f"{name}.txt").write_text(table, encoding="utf-8")
        except OSError as error:  # a full disk ends no run here
            metrics.message(f"the profile of steps {first} to {last} is lost: {error}")
            return
        metrics.message(f"profiled steps {first} to {last}: {folder}")
