"""Runs the grids that `test_verdicts` looks at: `python -m tests.experiments.grids OUT`."""

import sys
from pathlib import Path

from experiments import cli, kernel_times
from xlstm_mcore.mixers import kernel_calls

ONE = ["--only", "lr=0.003", "--only", "seed=0"]


def cells(*models: str) -> list[str]:
    """The words that choose one rate, one seed and some models."""
    return ONE + [word for model in models for word in ("--only", f"model={model}")]


def cut_memory_mixing() -> None:
    """Plant the error: the sLSTM forgets its recurrent weights."""
    scan = kernel_calls.slstm_scan

    def without(gate_preacts, recurrent_weight, *rest, **options):
        return scan(gate_preacts, 0.0 * recurrent_weight, *rest, **options)

    kernel_calls.slstm_scan = without


def main(out: Path) -> None:
    """Run them all; the right ones first."""
    parity = ["run", "parity", *cells("xLSTM[0:1]", "xLSTM[1:0]")]
    right = ["--out", str(out / "right")]
    assert cli.run([*parity, *right, "--strict"]) == 0
    mqar = ["run", "mqar", *cells("xLSTM[1:0]", "xLSTM[0:1]")]
    assert cli.run([*mqar, *right]) == 0
    assert cli.run(["cell", "parity", "--number", "0", *right]) == 0  # done, so nothing to do
    kernel_times._LEAST_S = 0.2  # a rough time will do here
    short = ["--only", "tokens=512", "--only", "tokens=1024", "--only", "tokens=2048"]
    only = ["--only", "model=mLSTM, chunkwise"]
    assert cli.run(["run", "parallel", *only, *short, *right]) == 0
    only = ["--only", "model=Mamba-2", "--only", "batch=1", "--only", "context=16"]
    assert cli.run(["run", "generation", *only, *right]) == 0
    cut_memory_mixing()
    code = cli.run(["run", "parity", *cells("xLSTM[0:1]"), "--out", str(out / "cut"), "--strict"])
    print("parity strict:", int(code))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
