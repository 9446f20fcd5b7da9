"""A cell that is a trained model on tasks of lm-evaluation-harness.

Its run is not of this grid: it is one of the papers' run files (`pretrain/configs`), trained on a
cluster. The results of the harness stay in the cell's folder.
"""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from experiments.definition import Cell
from experiments.grid import Grid
from xlstm_io.errors import ConfigError
from xlstm_io.signals import StopSignal

RESULTS_FILE = "harness.json"


def check(grid: Grid, cells: Sequence[Cell]) -> None:
    """Refuse cells that cannot begin.

    Raises:
        ConfigError: the harness is not installed, or a run does not exist.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            f"{grid.name} needs lm-evaluation-harness; pip install 'xlstm-pretrain[eval]'"
        )
    for run in dict.fromkeys(_run_of(grid, cell) for cell in cells):
        if not run.exists():
            raise ConfigError(
                f"{run} does not exist; train it with `python -m pretrain launch "
                f"pretrain/configs/{run.name}.yaml`, or choose other cells with --only"
            )


def _run_of(grid: Grid, cell: Cell) -> Path:
    """The folder of the run that a cell measures."""
    return Path(str(grid.experiment.models[cell.model]["run"]).format(**cell.values))


def body(grid: Grid, cell: Cell, folder: Path, stop: StopSignal) -> dict[str, Any]:
    """Answer the tasks with one model; see `grid.Body`.

    The measures are the share of right answers in percent by task and their mean, and `by_source`
    has the share of wrong ones.
    """
    from pretrain.evaluation import harness

    out, tasks = folder / RESULTS_FILE, grid.size.tasks
    harness.main(str(_run_of(grid, cell)), list(tasks), precision="bf16", out=str(out))
    results = json.loads(out.read_text())["results"]
    right = {task: 100 * results[task][f"{metric},none"] for task, metric in tasks.items()}
    return {
        "measures": {"mean": sum(right.values()) / len(right), **right},
        "scaled": {},
        "by_source": {task: 100 - share for task, share in right.items()},
    }
