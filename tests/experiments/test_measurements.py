"""What a cell measures: forms of a kernel, a generated token, the error of numbers."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments.cells import generation, kernel_times, measure
from experiments.definition import Cell
from experiments.grid import Grid


def cell_of(grid: Grid, model: str, **values) -> Cell:
    return Cell(0, model, values)


@pytest.mark.parametrize("model", ["mLSTM, chunkwise", "mLSTM, parallel", "mLSTM, token by token"])
def test_all_forms_of_the_mlstm_give_the_numbers_of_the_equation(model, monkeypatch):
    monkeypatch.setattr(kernel_times, "_LEAST_S", 0.0)
    monkeypatch.setattr(kernel_times, "_least_seconds", lambda call: call() or 1.0)
    grid = Grid.open("parallel", "toy", Path("unused"))
    found = kernel_times.body(grid, cell_of(grid, model, tokens=96), Path("unused"), None)
    assert found["measures"]["difference"] < 1e-5
    assert found["measures"]["microseconds per token"] == pytest.approx(1e6 / 96)


@pytest.mark.parametrize("form", kernel_times.FORMS)
def test_every_form_has_gradients_of_all_its_inputs(form):
    inputs, function = kernel_times.FORMS[form](32)
    kernel_times._forward_and_backward(function, inputs)
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in inputs)


@pytest.mark.parametrize("model", ["xLSTM[1:0]", "Transformer", "Mamba-2"])
def test_a_generated_token_is_timed_and_the_state_counted(model, monkeypatch):
    monkeypatch.setattr(generation, "_TOKENS", 2)
    grid = Grid.open("generation", "toy", Path("unused"))
    sizes = {}
    for context in (4, 32):
        cell = cell_of(grid, model, context=context, batch=2)
        found = generation.body(grid, cell, Path("unused"), None)
        assert found["measures"]["milliseconds"] > 0
        assert found["measures"]["tokens per second"] > 0
        assert found["measures"]["times the shortest"] > 0
        sizes[context] = found["state_bytes"]
    assert (sizes[32] > sizes[4]) == (model == "Transformer")


def test_a_machine_that_slows_down_does_not_slow_a_context_down(monkeypatch):
    """Every turn takes twice the time of the turn before it; the longer context 1.5 times."""
    read = []

    def after(model, section, context, batch):
        read.append(context)
        seconds = (context / 16 * 2.0**turn for turn in range(5))
        return lambda: next(seconds)

    monkeypatch.setattr(generation, "_TOKENS", 5)
    monkeypatch.setattr(generation, "_after", after)
    grid = Grid.open("generation", "toy", Path("unused"))
    cell = cell_of(grid, "Mamba-2", context=24, batch=2)
    measures = generation.body(grid, cell, Path("unused"), None)["measures"]
    assert read == [16, 24]
    assert measures["times the shortest"] == 1.5 and measures["milliseconds"] == 1500


def test_the_squared_error_is_that_of_the_mean_number(monkeypatch):
    """Ids 1 and 2 stand for 0.25 and 0.75; a model that gives 2 twice the weight says 0.583."""
    logits = torch.tensor([9.0, 0.0, math.log(2.0)]).expand(1, 3, 3)
    batch = SimpleNamespace(
        tokens=None,
        boundaries=None,
        labels=torch.tensor([[1, 2, 0]]),
        loss_mask=torch.tensor([[1.0, 1.0, 0.0]]),
        to=lambda device: batch,
    )
    monkeypatch.setattr(measure, "ValidLoader", lambda dataset, micro_batch: [batch])
    error = measure.squared_error(lambda *_: logits, None, [None, 0.25, 0.75], rows=1)
    said = (0.25 + 2 * 0.75) / 3
    assert error == pytest.approx(((said - 0.25) ** 2 + (said - 0.75) ** 2) / 2)
