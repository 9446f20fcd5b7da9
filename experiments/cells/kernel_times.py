"""A cell that is a measurement of a kernel: forward and backward over a sequence of some length.

What is measured is the least time of several calls. It is CPU time of one thread, which on a
machine that others use too says more than the clock on the wall; on a GPU it is that clock.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.definition import Cell
from experiments.grid import Grid
from xlstm_io.signals import StopSignal
from xlstm_kernels import mlstm_chunkwise, mlstm_step, slstm_scan
from xlstm_kernels.mlstm.reference import mlstm_recurrence
from xlstm_mcore import hardware
from xlstm_mcore.mixers.attention import attend

HEADS, WIDTH = 1, 64
CHUNK = 64
_LEAST_S = 2.0  # that calls take together: the least of many is the one that nobody disturbed
_COMPARED = 256  # tokens over which the forms are compared; any error shows there


def body(grid: Grid, cell: Cell, folder: Path, stop: StopSignal) -> dict[str, Any]:
    """Time one form at one length; see `grid.Body`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    form = grid.experiment.models[cell.model]["form"]
    tokens = int(str(cell.values["tokens"]))
    inputs, function = FORMS[form](tokens)
    seconds = _least_seconds(lambda: _forward_and_backward(function, inputs))
    measures = {"seconds": seconds, "microseconds per token": 1e6 * seconds / tokens}
    if form in ("parallel", "chunkwise", "steps"):
        measures["difference"] = _difference(form)
    return {"measures": measures, "scaled": {}, "cpu_seconds": seconds}


def clock() -> float:
    """Seconds: of this process's CPU time, or on a GPU of the wall."""
    on_cpu = hardware.device().type == "cpu"
    return time.process_time() if on_cpu else time.perf_counter()


def wait_for(result: Tensor) -> None:
    """Wait until a device has computed something."""
    result.flatten()[0].item()


def _least_seconds(call: Callable[[], None]) -> float:
    call()  # compiles loops and makes room
    least, total = float("inf"), 0.0
    while total < _LEAST_S:
        started = clock()
        call()
        seconds = clock() - started
        least, total = min(least, seconds), total + max(seconds, 1e-6)
    return least


def _forward_and_backward(function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    for tensor in inputs:
        tensor.grad = None
    function(*inputs).sum().backward()
    assert inputs[0].grad is not None
    wait_for(inputs[0].grad)


def _random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, device=hardware.device())


def _mlstm_inputs(tokens: int) -> list[Tensor]:
    shapes = [(1, HEADS, tokens, WIDTH)] * 3 + [(1, HEADS, tokens)] * 2
    inputs = [_random(shape) for shape in shapes]
    inputs[4] += 3.0  # forget gates that remember
    return [tensor.requires_grad_() for tensor in inputs]


def _parallel(tokens: int) -> tuple[list[Tensor], Callable[..., Tensor]]:
    return _mlstm_inputs(tokens), lambda *x: mlstm_chunkwise(*x, chunk_size=tokens)


def _chunkwise(tokens: int) -> tuple[list[Tensor], Callable[..., Tensor]]:
    return _mlstm_inputs(tokens), lambda *x: mlstm_chunkwise(*x, chunk_size=CHUNK)


def _steps(tokens: int) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """The equation itself, token by token, through autograd: the only step form with a gradient."""
    return _mlstm_inputs(tokens), lambda *x: mlstm_recurrence(*x)[0]


def _slstm(tokens: int) -> tuple[list[Tensor], Callable[..., Tensor]]:
    shapes = (1, tokens, 4, HEADS, WIDTH), (4, HEADS, WIDTH, WIDTH), (4, HEADS, WIDTH)
    inputs = [(0.1 * _random(shape)).requires_grad_() for shape in shapes]
    return inputs, slstm_scan


def _attention(tokens: int) -> tuple[list[Tensor], Callable[..., Tensor]]:
    inputs = [_random((1, tokens, HEADS, WIDTH)).requires_grad_() for _ in range(3)]
    return inputs, lambda q, k, v: attend(q, k, v, None)


FORMS = {
    "parallel": _parallel,
    "chunkwise": _chunkwise,
    "steps": _steps,
    "slstm": _slstm,
    "attention": _attention,
}


@torch.no_grad()
def _difference(form: str) -> float:
    """Largest difference of a form from the equation in fp64, over the largest value."""
    inputs, function = FORMS[form](_COMPARED)
    exact = mlstm_recurrence(*(tensor.double() for tensor in inputs))[0]
    got = function(*inputs)
    if form == "steps":  # what generation uses, in fp32
        sizes = (1, HEADS, WIDTH, WIDTH), (1, HEADS, WIDTH), (1, HEADS)
        state = tuple(torch.zeros(size, device=got.device) for size in sizes)
        tokens = (tuple(x[:, :, t] for x in inputs) for t in range(_COMPARED))
        got = torch.stack([mlstm_step(*token, state) for token in tokens], 2)
    return float((got - exact).abs().max() / exact.abs().max())
