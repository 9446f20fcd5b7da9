"""A cell that is a measurement of generation: one token after a context of some length.

The weights are random, since their values do not matter here. What is measured is the least time of
several tokens: CPU time of one thread, or on a GPU the clock on the wall. Attention has room for
its keys and values from the start, as in the paper's static cache, so that nothing is copied.

A machine that others use too is one tenth slower in one second than in the next, and the paper's
claim is about less than that. So each cell takes turns, a token at a time, with the shortest
context of the grid, and measures how many times as long a token of its own context takes.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.cells.kernel_times import clock, wait_for
from experiments.definition import Cell
from experiments.grid import Grid
from xlstm_io.signals import StopSignal
from xlstm_mcore import hardware
from xlstm_mcore.build import build_model, make_config
from xlstm_mcore.inference import single_process_groups
from xlstm_mcore.settings import ModelConfig
from xlstm_mcore.sizes.flops import state_bytes
from xlstm_mcore.sizes.parameters import count_parameters

_TOKENS = 128  # that are generated and timed
_PART = 256  # tokens of the context that are read at once


def body(grid: Grid, cell: Cell, folder: Path, stop: StopSignal) -> dict[str, Any]:
    """Time one token after one context; see `grid.Body`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    context, batch = (int(str(cell.values[axis])) for axis in ("context", "batch"))
    shortest = min(int(str(value)) for value in grid.size.axes["context"])
    keys = {**grid.experiment.run["model"], **_model_keys(grid, cell)}
    section = ModelConfig.model_validate(keys)
    (model,) = build_model(make_config(section), single_process_groups(), seed=0)
    model.eval()
    with torch.no_grad():
        turns = [_after(model, section, tokens, batch) for tokens in (shortest, context)]
        times = [(turns[0](), turns[1]()) for _ in range(_TOKENS)]
    least = min(own for _, own in times)
    size = state_bytes(section, 4, context)
    return {
        "parameters": count_parameters(section)["total"],
        "state_bytes": size,
        "measures": {
            "milliseconds": 1e3 * least,
            "times the shortest": statistics.median(own / short for short, own in times),
            "tokens per second": batch / least,
            "state kilobytes": size / 1e3,
        },
        "scaled": {},
    }


def _after(model: Any, section: ModelConfig, context: int, batch: int) -> Callable[[], float]:
    """Read a context; return a call that generates one more token and tells its seconds."""
    cache: dict[Any, Any] = {
        n: {"capacity": context + _TOKENS}
        for n, letter in enumerate(section.pattern)
        if letter == "*"
    }
    tokens = torch.randint(0, section.vocab_size, (batch, context), device=hardware.device())
    for first in range(0, context, _PART):
        model(tokens[:, first : first + _PART], cache=cache)
    token = tokens[:, -1:]

    def generate() -> float:
        nonlocal token
        started = clock()
        logits = model(token, cache=cache)
        token = logits[:, -1:].argmax(-1)
        wait_for(token)
        return clock() - started

    return generate


def _model_keys(grid: Grid, cell: Cell) -> dict[str, Any]:
    """The keys of the section `model` that make this model, and this size of it."""
    keys = {**grid.size.run, **grid.experiment.models[cell.model]}
    return {
        key.removeprefix("model."): value for key, value in keys.items() if key.startswith("model.")
    }
