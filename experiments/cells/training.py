"""A cell that is a run: its data, its run file, the training, and what is measured afterwards."""

import math
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.data import (
    TRAINING_FOLDER,
    data_folder,
    data_name,
    task_of,
    validation_folders,
)
from experiments.definition import Cell, Measure, Shape, TaskData
from experiments.grid import Grid, Stopped
from xlstm_io.errors import ConfigError, ExitCode
from xlstm_io.foreign.yaml_file import read_yaml
from xlstm_io.shards.manifest import load_manifest
from xlstm_io.signals import StopSignal
from xlstm_io.terminal import say
from xlstm_mcore.settings import ModelConfig
from xlstm_mcore.sizes.flops import training_flops

CONFIGS = Path(__file__).parents[2] / "pretrain" / "configs"
TRAINED, LONGEST = "trained", "longest"
RUN_FILE = "run.yaml"


def run_file(grid: Grid, cell: Cell, folder: Path) -> dict[str, dict[str, Any]]:
    """The sections of a cell's run file.

    Later ones win: a run file that we ship or the experiment's run, the size's keys, those of the
    model, those of the model at this size, those of the data, the shape, learning rate and seed. A
    budget of FLOPs gives the steps.
    """
    experiment, size = grid.experiment, grid.size
    if cell.model not in experiment.models:
        raise ConfigError(f"{grid.name} has no model {cell.model!r} among its models")
    shards = data_folder(grid, data_name(grid, cell)) / TRAINING_FOLDER
    manifest = load_manifest(shards)
    sections = _first_sections(grid, cell)
    keys: dict[str, Any] = {
        "run.dir": str(folder),
        "data.path": str(shards),
        "data.seq_len": manifest.seq_len,
        "model.vocab_size": manifest.tokenizer.vocab_size,
        **size.run,
        **experiment.models[cell.model],
        **size.model_keys.get(cell.model, {}),
        **size.data_keys.get(data_name(grid, cell), {}),
    }
    if "lr" in cell.values:
        keys["optimizer.lr"] = cell.values["lr"]
    if "seed" in cell.values:
        keys["run.seed"] = cell.values["seed"]
    for key, value in keys.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    if "shape" in cell.values:
        _take_shape(sections, size.shapes[str(cell.values["shape"])])
    if "budget" in cell.values:
        sections["run"]["steps"] = _steps_of(float(str(cell.values["budget"])), sections)
    steps, schedule = sections["run"]["steps"], sections.setdefault("schedule", {})
    schedule.setdefault("warmup_steps", round(experiment.warmup_share * steps))
    if "final_lr" in schedule:
        schedule["min_lr_ratio"] = schedule.pop("final_lr") / sections["optimizer"]["lr"]
    sections.setdefault("checkpoint", {}).setdefault("interval", steps)
    sections.setdefault("evaluation", {}).setdefault("interval", steps)
    return sections


def _first_sections(grid: Grid, cell: Cell) -> dict[str, dict[str, Any]]:
    """The sections that a cell's run file starts from."""
    shipped = grid.size.run_files.get(cell.model)
    if shipped is None:
        return {name: dict(keys) for name, keys in grid.experiment.run.items()}
    path = CONFIGS / shipped.format(**cell.values)
    return read_yaml(path, of="run file", example="run:, model:", error=ConfigError)


def _take_shape(sections: dict[str, dict[str, Any]], shape: Shape) -> None:
    """Put a shape's keys into a run file, and repeat the pattern over its blocks."""
    for key, value in shape.run.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    unit = sections["model"]["pattern"]
    sections["model"]["pattern"] = (unit * shape.layers)[: shape.layers]


def _steps_of(budget: float, sections: Mapping[str, Mapping[str, Any]]) -> int:
    """Steps of a run that take so many FLOPs, forward and backward."""
    seq_len = sections["data"]["seq_len"]
    model = ModelConfig.model_validate(sections["model"])
    of_a_step = training_flops(model, seq_len) * seq_len * sections["data"]["global_batch"]
    return max(1, round(budget / of_a_step))


def body(grid: Grid, cell: Cell, folder: Path, stop: StopSignal) -> dict[str, Any]:
    """Train the run of a cell from where it stands, and measure it; see `grid.Body`.

    Raises:
        UserError: the run file is wrong, or the run diverged.
        Stopped: the run was asked to stop, or another process is at work in its folder.
    """
    import torch

    from pretrain.commands.run import train
    from pretrain.config import config_from_dict, save_config
    from pretrain.supervision.lease import LeaseHeldError
    from xlstm_mcore.sizes.flops import state_bytes
    from xlstm_mcore.sizes.parameters import count_parameters

    torch.set_num_threads(1)
    config = config_from_dict(run_file(grid, cell, folder), source=f"{grid.name} {cell}")
    save_config(config, folder / RUN_FILE)
    try:
        code = train.main(config, stop)
    except LeaseHeldError as error:
        raise Stopped from error
    if code == ExitCode.STOPPED:
        raise Stopped
    trained_s = resource.getrusage(resource.RUSAGE_SELF)
    measured = measure_sets(grid, cell, config)
    counts = count_parameters(config.model)
    return {
        "parameters": counts["total"],
        "parameters_of_blocks": counts["blocks"],
        "state_bytes": state_bytes(config.model, 4, config.data.seq_len),
        "steps": config.run.steps,
        "tokens": config.run.steps * config.tokens_per_step,
        "cpu_seconds": round(grid.spent(cell) + trained_s.ru_utime + trained_s.ru_stime, 1),
        "trained_to": _longest(grid, cell),
        "chance": measured[TRAINED].get("chance"),
        "sets": measured,
        "measures": measures_of(grid, measured),
        "scaled": scaled_of(grid, measured),
        "by_source": measured[TRAINED].get("by_source", {}),
    }


def _longest(grid: Grid, cell: Cell) -> int:
    """Tokens of the longest sample, or row of text, that a cell is trained on."""
    from data_prep.synthetic.task import Span

    data = grid.size.data[data_name(grid, cell)]
    if not isinstance(data, TaskData):
        return data.seq_len
    task = task_of(data, data_folder(grid, data_name(grid, cell)))
    return Span.parse(task.length, "length").high


def measure_sets(grid: Grid, cell: Cell, config: Any) -> dict[str, Any]:
    """What `experiments.cells.measure` finds on each validation set of a cell's data, by length."""
    from experiments.cells.measure import measure

    name = data_name(grid, cell)
    folder, data = data_folder(grid, name), grid.size.data[name]
    task = task_of(data, folder) if isinstance(data, TaskData) else None
    numbers = None if task is None else numbers_of(task)
    found = {}
    for key, shards in validation_folders(folder, TRAINED).items():
        of_set = [m for m in grid.experiment.measures.values() if m.set == key]
        by: set[str] = {str(one.by) for one in of_set if one.by != "position"}
        by |= {"source"} if grid.experiment.by_source and key == TRAINED else set()
        found[key] = measure(config, shards, numbers, by)
        if task is not None:
            found[key]["chance"] = task.chance
        words = (f"{word} {n:.4f}" for word, n in found[key].items() if isinstance(n, float))
        say(f"{key}: {', '.join(words)}")
    return found


def numbers_of(task: Any) -> list[float | None] | None:
    """The number in [0, 1] that each id of a task answers; None where answers are no numbers."""
    from data_prep.synthetic.recall import NearestNeighbour

    if not isinstance(task, NearestNeighbour):
        return None
    bins = {f"v{n}": (n + 0.5) / task.values for n in range(task.values)}
    return [bins.get(symbol) for symbol in task.symbols()]


def measures_of(grid: Grid, sets: Mapping[str, Any]) -> dict[str, float]:
    """The experiment's measures, from what was found on the sets; without tokens there is none."""
    measures, sets = grid.experiment.measures, _with_longest(sets)
    plain = {
        name: value
        for name, measure in measures.items()
        if measure.set in sets and (value := _from(sets[measure.set], measure)) is not None
    }
    found = {}
    for name, value in plain.items():
        less = measures[name].less
        if less is None:
            found[name] = value
        elif less in plain:
            found[name] = value - plain[less]
    return found


def _with_longest(sets: Mapping[str, Any]) -> dict[str, Any]:
    """What was found on the sets, and on the longest of those beyond training as `longest`."""
    beyond = [key for key in sets if key not in (TRAINED, LONGEST)]
    longest = max(beyond, key=lambda key: int(key.rpartition("-")[2]), default=None)
    return dict(sets) if longest is None else {**sets, LONGEST: sets[longest]}


def scaled_of(grid: Grid, sets: Mapping[str, Any]) -> dict[str, float]:
    """Accuracies scaled so that a guess is 0: `(a - chance) / (1 - chance)` (arXiv 2405.04517)."""
    found, sets = {}, _with_longest(sets)
    for name, value in measures_of(grid, sets).items():
        measure = grid.experiment.measures[name]
        if measure.value == "accuracy":
            chance = sets[measure.set]["chance"]
            found[name] = (value - chance) / (1 - chance)
    return found


def _from(measured: Mapping[str, Any], measure: Measure) -> float | None:
    """The mean of a value over some positions or frequencies; the squared error is of them all.

    None where no token is there.
    """
    if measure.value == "squared_error":
        return measured[measure.value]
    last = measure.below or float("inf")
    groups = [g for g in measured[f"by_{measure.by}"] if measure.at_least <= g["from"] < last]
    answers = sum(g["answers"] for g in groups)
    if not answers:
        return None
    key = {"perplexity": "loss", "error": "accuracy"}.get(measure.value, measure.value)
    mean = sum(g[key] * g["answers"] for g in groups) / answers
    if measure.value == "error":
        return 1 - mean
    return math.exp(mean) if measure.value == "perplexity" else mean
