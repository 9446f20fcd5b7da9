"""What an experiment is: a YAML file of `definitions/`, read and checked.

An experiment compares models on data. Its cells are all combinations of models, data and axes (such
as learning rate and seed) of one size: toy, small, large or paper.
"""

import difflib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from experiments.results.claims import Claim
from xlstm_io.errors import ConfigError
from xlstm_io.foreign.yaml_file import read_yaml

DEFINITIONS = Path(__file__).with_name("definitions")
SIZES = ("toy", "small", "large", "paper")

Value = str | int | float | bool | None


class Strict(BaseModel):
    """Unknown keys are errors, and values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskData(Strict):
    """Data of a synthetic task."""

    task: str
    """a task of `data_prep synthetic`"""
    options: dict[str, Any] = Field(default_factory=dict)
    """its options, by the names of the task's fields"""


class TextData(Strict):
    """The sources of Python's standard library, with a tokenizer of their own."""

    vocab_size: int
    """ids of the tokenizer"""
    seq_len: int
    """tokens of a row"""
    longer: list[int] = Field(default_factory=list)
    """further lengths of rows to validate on"""
    packages: list[str] = Field(default_factory=list)
    """only these packages of the library, each a source by itself"""


class ShardsData(Strict):
    """Shards that somebody has built, for runs as large as the papers'."""

    path: str
    """their folder, from where the command is given"""
    seq_len: int
    """tokens of a row"""
    build: str
    """the command that builds them"""


class Shape(Strict):
    """A size of a model in a grid over sizes."""

    layers: int
    """blocks: the model's pattern is repeated until it has as many"""
    budgets: list[float] | None = None
    """only these of the axis `budget` are spent on it; null for all"""
    run: dict[str, Any] = Field(default_factory=dict)
    """keys of the run file"""


class Measure(Strict):
    """A number of a cell, taken from what was measured on one set."""

    set: str
    """`trained`, the length of another validation folder, or `longest` for the last of those"""
    value: Literal["accuracy", "error", "loss", "perplexity", "squared_error"] = "accuracy"
    """what is read; an error is the share of wrong answers"""
    by: Literal["position", "frequency"] = "position"
    """which tokens count: by their place in the document, or by how often the target is one in the
    training data"""
    at_least: int = 1
    """only tokens from this place or frequency on count; a power of two"""
    below: int | None = None
    """and only those below; a power of two"""
    less: str | None = None
    """the name of a measure that is subtracted"""


class Size(Strict):
    """How large the grid is."""

    about: str
    """what it is for, and how long it takes"""
    data: dict[str, TaskData | TextData | ShardsData] = Field(default_factory=dict)
    """data by name; each is one value of the axis `data`"""
    run: dict[str, Any] = Field(default_factory=dict)
    """keys of the run file of all cells; `schedule.final_lr` is the rate at the end of the decay,
    where the share of the peak differs between cells"""
    models: list[str]
    """names of `models`"""
    model_keys: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """keys of the run file for one model at this size"""
    data_keys: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """keys of the run file for the runs on one of the data"""
    rates: dict[str, list[float]] = Field(default_factory=dict)
    """learning rates for the runs on one of the data, in the place of the axis `lr`"""
    run_files: dict[str, str] = Field(default_factory=dict)
    """by model the run file of `pretrain/configs` that its cells start from, with axes in braces"""
    shapes: dict[str, Shape] = Field(default_factory=dict)
    """sizes of the models by name, which the axis `shape` takes"""
    axes: dict[str, list[Value]] = Field(default_factory=dict)
    """`lr`, `seed`, `shape`, `budget` (FLOPs of a run, in the place of its steps), and whatever the
    kind of experiment knows"""
    most: dict[str, dict[str, float]] = Field(default_factory=dict)
    """largest value on an axis for a model that cannot go further: model, axis, value"""
    tasks: dict[str, str] = Field(default_factory=dict)
    """downstream: tasks of lm-evaluation-harness, and the metric of each"""
    enough_for: list[str] = Field(default_factory=list)
    """models that were seen to fit their training data at this size"""


class Figure(Strict):
    """The picture of an experiment."""

    kind: Literal["positions", "bars", "squares", "lines", "budgets", "frequencies", "sources"]
    """accuracy over position, a bar per model, a square per model and data, a line per model over
    an axis, the measure over parameters with a line per model and budget, perplexity over the
    frequency of the token, or perplexity by source"""
    measure: str
    """the number that is drawn"""
    label: str
    """the axis of the numbers"""
    over: str | None = None
    """lines: the axis below"""
    at: dict[str, Value] = Field(default_factory=dict)
    """only rows with these values on the axes"""
    logarithmic: bool = False
    """lines: both axes; bars: the axis of the numbers"""


class Experiment(Strict):
    """An experiment of the papers."""

    title: str
    """one line"""
    source: str
    """the paper, and where in it"""
    kind: Literal["training", "kernels", "generation", "downstream"] = "training"
    """what a cell is: a run that is measured, or a measurement"""
    run: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """sections of the run file that all cells share"""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """warmup steps over all steps of a run"""
    models: dict[str, dict[str, Any]]
    """keys of the run file by the model's name"""
    sizes: dict[str, Size]
    """by name"""
    measures: dict[str, Measure] = Field(default_factory=dict)
    """numbers of a cell, by name"""
    by_source: bool = False
    """whether the loss is also measured on every source by itself"""
    choose: str | None = None
    """the measure by which the learning rate is chosen"""
    claims: list[Claim]
    """what the paper says"""
    figure: Figure
    """its picture"""
    published: dict[str, float | dict[str, float]] = Field(default_factory=dict)
    """the paper's own numbers by model (and data or shape), where they exist as numbers"""

    def published_for(self, model: str, values: Mapping[str, Any]) -> float | None:
        """The paper's number for a model, on the data or of the shape that `values` names."""
        found = self.published.get(model)
        if not isinstance(found, dict):
            return found
        return found.get(str(values.get("data", values.get("shape"))))


@dataclass(frozen=True)
class Cell:
    """One run or measurement of a grid.

    Attributes:
        number: its place in the grid.
        model: name of its model.
        values: its value on every axis, `data` among them where there are several.
    """

    number: int
    model: str
    values: Mapping[str, Value]

    @cached_property
    def name(self) -> str:
        """A name for folders: `xLSTM01-lr0.003-seed0`."""
        words = [_plain(self.model)]
        words += [f"{key}{_plain(written(value))}" for key, value in self.values.items()]
        return "-".join(words)

    def __str__(self) -> str:
        return ", ".join([self.model, *(f"{k} {written(v)}" for k, v in self.values.items())])


def written(value: Value) -> str:
    """A value on an axis as people write it: 1e+11, not 100000000000.0."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "", text.replace("*", "x"))


def names() -> list[str]:
    """The names of all experiments."""
    return sorted(path.stem for path in DEFINITIONS.glob("*.yaml"))


def load(name: str) -> Experiment:
    """An experiment by its name.

    Raises:
        ConfigError: there is none of that name, or its file is wrong.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, cutoff=0.0)[0]
        raise ConfigError(
            f"there is no experiment {name!r}; did you mean {near}? All: {', '.join(known)}"
        )
    path = DEFINITIONS / f"{name}.yaml"
    raw = read_yaml(path, of="experiment", example="title:, models:", error=ConfigError)
    try:
        return Experiment.model_validate(raw)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{path}: " + "; ".join(lines)) from error


def size_of(name: str, experiment: Experiment, size: str) -> Size:
    """One size of an experiment.

    Raises:
        ConfigError: it does not have that size.
    """
    if size not in experiment.sizes:
        raise ConfigError(f"--size {size}: {name} has the sizes {', '.join(experiment.sizes)}")
    return experiment.sizes[size]


def cells_of(size: Size) -> list[Cell]:
    """All cells of a size, in an order that never changes."""
    axes: dict[str, Sequence[Value]] = dict(size.axes)
    if len(size.data) > 1:
        axes["data"] = list(size.data)
    rates = dict.fromkeys(rate for own in size.rates.values() for rate in own)
    if rates:
        axes["lr"] = list(dict.fromkeys([*axes["lr"], *rates]))
    combinations = (
        (str(model), dict(zip(axes, values, strict=True)))
        for model, *values in itertools.product(size.models, *axes.values())
    )
    possible = (item for item in combinations if _is_possible(size, *item))
    return [Cell(number, model, values) for number, (model, values) in enumerate(possible)]


def _is_possible(size: Size, model: str, values: Mapping[str, Value]) -> bool:
    limits = size.most.get(model, {})
    if "lr" in values:
        rates = size.rates.get(str(values.get("data")), size.axes["lr"])
        if values["lr"] not in rates:
            return False
    if "shape" in values and "budget" in values:
        budgets = size.shapes[str(values["shape"])].budgets
        if budgets is not None and values["budget"] not in budgets:
            return False
    return all(float(str(values[axis])) <= most for axis, most in limits.items())


def settings_of(experiment: Experiment, size: Size, cell: Cell) -> dict[str, Any]:
    """What the run or measurement of a cell depends on, with dotted keys: `run.run.steps`."""
    data = [str(cell.values["data"])] if "data" in cell.values else list(size.data)
    parts = {
        "kind": experiment.kind,
        "run": experiment.run,
        "warmup_share": experiment.warmup_share,
        "models": experiment.models[cell.model],
        "run_file": size.run_files.get(cell.model),
        "size": size.run,
        "model_keys": size.model_keys.get(cell.model, {}),
        "data": {name: size.data[name].model_dump() for name in data},
        "data_keys": {name: size.data_keys.get(name, {}) for name in data},
        "tasks": size.tasks,
    }
    if "shape" in cell.values:
        shape = size.shapes[str(cell.values["shape"])]
        parts["shape"] = shape.model_dump(exclude={"budgets"})  # say which cells there are
    return dict(_dotted(json.loads(json.dumps(parts))))


def _dotted(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield key, value
        return
    for name, part in value.items():
        yield from _dotted(part, f"{key}.{name}" if key else name)


def chosen(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that `--only` names, such as `model=ss`, `lr=0.003`; several of a key are either.

    Raises:
        ConfigError: a word is not of that form, or no cell has the value.
    """
    wanted: dict[str, set[str]] = {}
    for word in only:
        key, equals, value = word.partition("=")
        values = {_axis(cell, key) for cell in cells}
        if not equals or value not in values:
            given = ", ".join(sorted(v for v in values if v is not None))
            keys = ", ".join(["model", *(cells[0].values if cells else ())])
            raise ConfigError(
                f"--only {word}: write KEY=VALUE with a key of {keys}"
                + (f"; {key} is one of {given}" if given else "")
            )
        wanted.setdefault(key, set()).add(value)
    return [c for c in cells if all(_axis(c, key) in values for key, values in wanted.items())]


def _axis(cell: Cell, key: str) -> str | None:
    if key == "model":
        return cell.model
    return written(cell.values[key]) if key in cell.values else None


def groups(cells: Sequence[Cell]) -> Iterator[tuple[str, dict[str, Value]]]:
    """Each model with each of its values but for learning rate and seed, once."""
    seen = []
    for cell in cells:
        key = (cell.model, {k: v for k, v in cell.values.items() if k not in ("lr", "seed")})
        if key not in seen:
            seen.append(key)
            yield key
