"""A look into every layer, every `logging.cells` steps: `RUN/cells.jsonl`.

Two kinds of figures, each of the whole model on every layout:

- of the update: the norms of gradient, update and weights. The gradient is the complete one before
  clipping. The update is the difference of the fp32 master weights, so it has everything in it:
  clipping, the learning rate, weight decay. It needs a copy of this rank's masters in host memory.
- of the cells: the distribution of both gates, and the size of state and normaliser at the ends of
  the rows. They come from a forward pass without gradients of every replica's first micro-batch,
  after the update. So recomputation and pipeline schedules do not count a token twice.

Every rank counts what it holds: its heads, its tokens, its slices. Two all-reduces complete it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config import RunConfig
from pretrain.data import Batch
from pretrain.engines.base import Engine
from pretrain.engines.gradients import sum_of_squares
from pretrain.engines.state import MASTER
from pretrain.layout import Layout
from pretrain.watching.metrics import MetricLogger
from pretrain.watching.watcher import StepWatcher, WatchedStep
from xlstm_mcore.mixers.observation import CellValues
from xlstm_mcore.parameters.names import EMBEDDING, FINAL_NORM, OUTPUT
from xlstm_mcore.pattern import parse_pattern

GATES = ("igate", "fgate")
NORMS = ("grad_norm", "update_norm", "weight_norm")
QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}
# Pre-activations are counted in bins of this width around 0; the outer ones take what is beyond.
BINS, WIDTH = 512, 0.125
# What is not in a layer, by the name that its line has.
OTHERS = {EMBEDDING: "embedding", FINAL_NORM: "final_norm", OUTPUT: "output_layer"}


class CellWatcher(StepWatcher):
    """Takes the figures of a step; every method is called by all ranks.

    Args:
        config: the run.
        layout: where this process stands.
        engine: the model with its optimizer.
    """

    def __init__(self, config: RunConfig, layout: Layout, engine: Engine) -> None:
        self.every, self._layout, self._engine = config.logging.cells, layout, engine
        self._letters = parse_pattern(config.model.pattern).letters
        self._names: list[int | str] = [*range(len(self._letters)), *OTHERS.values()]
        self._squares = torch.zeros(0)
        self._before: list[Tensor] = []

    def before_update(self) -> None:
        """Take the gradient and a copy of the weights, between the gradient's norm and the step."""
        self._squares = torch.zeros(len(NORMS), len(self._names), dtype=torch.float64)
        for part in self._engine.gradients():
            self._add("grad_norm", part.name, part.tensor)
        self._before = []
        for part in self._engine.masters():
            self._add("weight_norm", part.name, part.tensor)
            self._before.append(part.tensor.detach().to("cpu", copy=True))

    def tell(self, seen: WatchedStep, metrics: MetricLogger) -> None:
        """Look into the cells, and log the lines of the step."""
        metrics.log_cells(self.lines(seen.step, seen.batches[0]))

    def lines(self, step: int, batch: Batch) -> list[dict[str, Any]]:
        """The lines of a step: one for each layer, and one for each other part of the model.

        Args:
            step: finished steps.
            batch: this replica's first micro-batch.
        """
        for part, before in zip(self._engine.masters(), self._before, strict=True):
            self._add("update_norm", part.name, part.tensor.detach().cpu() - before)
        self._before = []
        squares = self._squares.to(self._layout.device)
        dist.all_reduce(squares)
        cells = CellStatistics(len(self._letters), self._layout.device)
        with cells.observing(self._engine.models):
            self._engine.evaluate([batch])
        found = cells.reduce()
        norms = squares.sqrt().t().tolist()
        present = squares[NORMS.index("weight_norm")].tolist()
        lines = []
        for place, name in enumerate(self._names):
            if not present[place]:  # a tied head
                continue
            line: dict[str, Any] = {"step": step, "layer": name}
            if isinstance(name, int):
                line |= {"letter": self._letters[name], **found.get(name, {})}
            lines.append(line | dict(zip(NORMS, norms[place], strict=True)))
        return lines

    def _add(self, norm: str, name: str, values: Tensor) -> None:
        name = name.removeprefix(MASTER)
        place: int | str = OTHERS.get(name, "")
        if not place:
            place = int(name.removeprefix("decoder.layers.").partition(".")[0])
        total = sum_of_squares([values], values.device)
        self._squares[NORMS.index(norm), self._names.index(place)] += total.item()


class CellStatistics:
    """Adds up what cells did in forward passes.

    Args:
        layers: number of layers of the whole model.
        device: where the model computes.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(layers, *shape, dtype=torch.float64, device=device)

        # Of each gate: number, sum and sum of squares, then the bins.
        self._gates = zeros(len(GATES), 3 + BINS)
        # Number and sum of the states, and of the normalisers, and how many of these are at 0.
        self._ends = zeros(5)
        # Largest pre-activation of each gate, and largest negative one.
        self._most = zeros(len(GATES), 2) - torch.inf

    def observing(self, models: Sequence[torch.nn.Module]) -> "_Observing":
        """A block in which the cells of these model chunks are observed."""
        return _Observing(self, models)

    @torch.no_grad()
    def add(self, layer: int, values: CellValues) -> None:
        """Count one forward pass of a layer's cell."""
        for number, gate in enumerate((values.igate, values.fgate)):
            flat = gate.double().flatten()
            bins = (flat / WIDTH + BINS / 2).clamp(0, BINS - 1).nan_to_num().long()
            row = self._gates[layer, number]
            row[:3] += torch.stack((torch.ones_like(flat), flat, flat.square())).sum(1)
            row[3:] += torch.bincount(bins, minlength=BINS)
            most = torch.stack((flat.max(), -flat.min()))
            self._most[layer, number] = torch.maximum(self._most[layer, number], most)
        ends = self._ends[layer]
        if values.state is not None:
            ends[:2] += torch.stack((torch.ones_like(values.state), values.state)).flatten(1).sum(1)
        if values.normalizer is not None:
            size = values.normalizer
            at_floor = (size == 0).to(size.dtype)
            ends[2:] += torch.stack((torch.ones_like(size), size, at_floor)).flatten(1).sum(1)

    def reduce(self) -> dict[int, dict[str, float]]:
        """The figures of every layer that has a cell, over all ranks; called by all of them."""
        dist.all_reduce(self._gates)
        dist.all_reduce(self._ends)
        dist.all_reduce(self._most, op=dist.ReduceOp.MAX)
        found = {}
        for layer, (gates, ends, most) in enumerate(
            zip(self._gates.tolist(), self._ends.tolist(), self._most.tolist(), strict=True)
        ):
            if not gates[0][0]:
                continue
            line: dict[str, float] = {}
            for name, sums, (high, low) in zip(GATES, gates, most, strict=True):
                line |= {f"{name}_{key}": v for key, v in _distribution(sums, -low, high).items()}
            states, state, sizes, size, at_floor = ends
            if states:
                line["state_log_norm"] = state / states
            if sizes:
                line["normalizer_log"] = size / sizes
                line["normalizer_at_floor"] = at_floor / sizes
            found[layer] = line
        return found


class _Observing:
    """Sets and removes the observers."""

    def __init__(self, statistics: CellStatistics, models: Sequence[torch.nn.Module]) -> None:
        self._statistics = statistics
        self._layers = [layer for model in models for layer in model.decoder.layers]

    def __enter__(self) -> None:
        for layer in self._layers:
            layer.mixer.observe = partial(self._statistics.add, layer.layer_number)

    def __exit__(self, *exc_info: object) -> None:
        for layer in self._layers:
            layer.mixer.observe = None


def _distribution(sums: Sequence[float], low: float, high: float) -> dict[str, float]:
    """Mean, standard deviation, ends and quantiles; a quantile is exact to the width of a bin."""
    number, total, squares, *bins = sums
    mean = total / number
    found = {"mean": mean, "std": max(0.0, squares / number - mean**2) ** 0.5}
    found |= {"min": low, "max": high}
    for name, share in QUANTILES.items():
        rest = share * number
        place = 0
        while place < BINS - 1 and rest > bins[place]:
            rest -= bins[place]
            place += 1
        inside = rest / bins[place] if bins[place] else 0.0
        found[name] = min(max((place + inside - BINS / 2) * WIDTH, low), high)
    return found
