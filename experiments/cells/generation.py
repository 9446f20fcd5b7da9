"""A cell that is a measurement of generation: one token after a context of some length.

The weights are random, since their values do not matter here. What is measured is the least time of
several tokens: CPU time of one thread, or on a GPU the clock on the wall. Attention has room for
its keys and values from the start, as in the paper's static cache, so that nothing is copied.
"""

from pathlib import Path
from typing import Any

import torch

from experiments.cells.kernel_times import clock, wait_for
from experiments.definition import Cell
from experiments.grid import Grid
from xlstm_io.signals import StopSignal
from xlstm_mcore.build import build_model, make_config
from xlstm_mcore.inference import single_process_groups
from xlstm_mcore.megatron import cpu_runtime
from xlstm_mcore.settings import ModelConfig
from xlstm_mcore.sizes.flops import state_bytes
from xlstm_mcore.sizes.parameters import count_parameters

_TOKENS = 24  # that are generated and timed
_PART = 256  # tokens of the context that are read at once


def body(grid: Grid, cell: Cell, folder: Path, stop: StopSignal) -> dict[str, Any]:
    """Time one token after one context; see `grid.Body`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    context, batch = (int(str(cell.values[axis])) for axis in ("context", "batch"))
    keys = {**grid.experiment.run["model"], **_model_keys(grid, cell)}
    section = ModelConfig.model_validate(keys)
    (model,) = build_model(make_config(section), single_process_groups(), seed=0)
    model.eval()
    cache: dict[Any, Any] = {
        n: {"capacity": context + 2 * _TOKENS}
        for n, letter in enumerate(section.pattern)
        if letter == "*"
    }
    least = float("inf")
    with torch.no_grad():
        device = cpu_runtime.device()
        tokens = torch.randint(0, section.vocab_size, (batch, context), device=device)
        for first in range(0, context, _PART):
            model(tokens[:, first : first + _PART], cache=cache)
        token = tokens[:, -1:]
        for _ in range(_TOKENS):
            started = clock()
            logits = model(token, cache=cache)
            token = logits[:, -1:].argmax(-1)
            wait_for(token)
            least = min(least, clock() - started)
    size = state_bytes(section, 4, context)
    return {
        "parameters": count_parameters(section)["total"],
        "state_bytes": size,
        "measures": {
            "milliseconds": 1e3 * least,
            "tokens per second": batch / least,
            "state kilobytes": size / 1e3,
        },
        "scaled": {},
    }


def _model_keys(grid: Grid, cell: Cell) -> dict[str, Any]:
    """The keys of the section `model` that make this model, and this size of it."""
    keys = {**grid.size.run, **grid.experiment.models[cell.model]}
    return {
        key.removeprefix("model."): value for key, value in keys.items() if key.startswith("model.")
    }
