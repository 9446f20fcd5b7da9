"""Runs the grids that `test_verdicts` looks at: `python -m tests.experiments.grids OUT`.

The grids are those of toy size with shorter samples and fewer steps. The models still separate by
a wide margin, and all cells together take a quarter of the time.
"""

import sys
from pathlib import Path
from typing import Any

from experiments import cli, definition, grid
from experiments.cells import kernel_times
from xlstm_mcore.mixers import kernel_calls

#: Keys of the run file and options of the task in the place of those of toy size, which also has
#: two rates and two seeds.
SMALLER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "parity": (
        {"run.steps": 200, "model.hidden_size": 16},
        {"length": "3-20", "seq_len": 20, "samples": 8000, "validation_samples": 200},
    ),
    "mqar": (
        {"run.steps": 160},
        {"length": "16", "samples": 6400, "validation_samples": 1000},
    ),
}


def load_smaller(name: str) -> definition.Experiment:
    """The experiment with the smaller toy size."""
    experiment = definition.load(name)
    if name in ("scaling", "rare-tokens"):
        return on_symbols(experiment, name)
    fields = experiment.model_dump()
    toy = fields["sizes"]["toy"]
    if name == "parallel":
        toy["axes"]["tokens"] = [512, 1024, 2048]
    if name not in SMALLER:
        return definition.Experiment.model_validate(fields)
    keys, options = SMALLER[name]
    toy["run"] |= keys
    toy["axes"] |= {"lr": [0.01], "seed": [0]}
    for data in toy["data"].values():
        data["options"] |= options
    return definition.Experiment.model_validate(fields)


def on_symbols(experiment: definition.Experiment, name: str) -> definition.Experiment:
    """The experiment at its smallest, on symbols that need no tokenizer.

    Scaling has one budget and three sizes, and rare tokens one cell of three steps.
    """
    fields = experiment.model_dump()
    toy = fields["sizes"]["toy"]
    options = {"length": "3-20", "seq_len": 20, "samples": 4000, "validation_samples": 200}
    toy["data"] = {"symbols": {"task": "parity", "options": options | {"dense": True}}}
    axes = {"lr": [0.003], "seed": [0]}
    if name == "scaling":
        toy["models"] = ["xLSTM"]
        toy["shapes"] = {
            f"w{width}": {"layers": 1, "run": {"model.hidden_size": width}}
            for width in (16, 32, 64)
        }
        axes = {"budget": [4e8], "shape": list(toy["shapes"]), **axes}
    else:
        toy["models"] = ["mLSTM"]
        toy["run"] = {"run.steps": 3}
        fields["by_source"] = True
    toy["axes"] = axes
    return definition.Experiment.model_validate(fields)


def cells(*models: str) -> list[str]:
    """The words that choose some models."""
    return [word for model in models for word in ("--only", f"model={model}")]


def cut_memory_mixing() -> None:
    """Plant the error: the sLSTM forgets its recurrent weights."""
    scan = kernel_calls.slstm_scan

    def without(gate_preacts, recurrent_weight, *rest, **options):
        return scan(gate_preacts, 0.0 * recurrent_weight, *rest, **options)

    kernel_calls.slstm_scan = without


def main(out: Path) -> None:
    """Run them all; the right ones first."""
    grid.load = load_smaller
    parity = ["run", "parity", *cells("xLSTM[0:1]", "xLSTM[1:0]")]
    right = ["--out", str(out / "right")]
    assert cli.run([*parity, *right, "--strict"]) == 0
    mqar = ["run", "mqar", *cells("xLSTM[1:0]", "xLSTM[0:1]")]
    assert cli.run([*mqar, *right]) == 0
    assert cli.run(["cell", "parity", "--number", "0", *right]) == 0  # done, so nothing to do
    kernel_times._LEAST_S = 0.2  # a rough time will do here
    assert cli.run(["run", "parallel", *cells("mLSTM, chunkwise"), *right]) == 0
    only = ["--only", "model=Mamba-2", "--only", "batch=1", "--only", "context=16"]
    assert cli.run(["run", "generation", *only, *right]) == 0
    assert cli.run(["run", "scaling", *right]) == 0
    assert cli.run(["run", "rare-tokens", *right]) == 0
    cut_memory_mixing()
    code = cli.run(["run", "parity", *cells("xLSTM[0:1]"), "--out", str(out / "cut"), "--strict"])
    print("parity strict:", int(code))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
