"""Activation recompute: what the backward pass computes again instead of finding it in memory.

*Full*: a layer keeps only its input and runs its forward pass twice (Megatron's checkpoint, which
replays the random states of both of its generators).

*Selective*: a layer keeps what its matrix products and cells need and what they return. It does
not keep what follows from that at the cost of reading it: norms, the activation of the
feed-forward part, output gates, fp32 copies, and what sequence parallelism gathered. Autograd saves
such a tensor twice, as an input or output of the cheap operation and again as a factor of the next
matrix product, so making the operation a checkpoint is not enough. `recompute_in_backward` also
leaves a recipe wherever a later operation of the layer saves its output. Where that is the product
at the end of a mixer or feed-forward part, both are one step for autograd (`products.product_of`).
The mLSTM cell of a 7B-style block, a small part of that block, runs once more (`rerun_cell`).

*Cells*: selective, and the mLSTM cells of the other blocks run once more as well. They keep neither
their states nor their output.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

MODES = ("none", "selective", "cells", "full")


class _Recipe:
    """How to compute a tensor again. It is computed once for all that are known to need it."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        self.function, self.inputs = function, inputs
        self.uses = 0
        self._value: Tensor | None = None

    def value(self) -> Tensor:
        """The tensor. It is freed after the last of the expected uses."""
        value = self._value
        if value is None:
            with torch.no_grad():
                value = self.function(*(_unpack(i) for i in self.inputs))
        self.uses -= 1
        self._value = value if self.uses > 0 else None
        return value


class _View:
    """A saved tensor that lies in the memory of a recipe's tensor."""

    def __init__(self, recipe: _Recipe, tensor: Tensor) -> None:
        recipe.uses += 1
        self.recipe, self.place = recipe, _place(tensor)

    def tensor(self) -> Tensor:
        """The saved tensor, computed again."""
        value = self.recipe.value()
        return value if _place(value) == self.place else value.as_strided(*self.place)


def _place(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], int]:
    """Where a tensor lies in its memory."""
    return tensor.size(), tensor.stride(), tensor.storage_offset()


class _Rerun:
    """A function that runs once more in the backward pass, with a graph for its own gradient.

    It holds no inputs: autograd does, and frees them after the backward pass of their node. A
    schedule may hold the graph itself for longer.
    """

    def __init__(self, function: Callable[..., Tensor], needed: Sequence[bool]) -> None:
        self.function, self.needed = function, needed
        self._found: tuple[Tensor, list[Tensor]] | None = None

    def output_and_inputs(self, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The output of the second run, and the leaves of its graph."""
        if self._found is None:
            leaves = [t.data.requires_grad_(n) for t, n in zip(inputs, self.needed, strict=True)]
            with torch.enable_grad():
                self._found = self.function(*leaves), leaves
        return self._found

    def output(self, *inputs: Tensor) -> Tensor:
        """The output, for others."""
        return self.output_and_inputs(inputs)[0].data

    def gradients(self, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
        """The gradient of each input, None where it needs none. What was held is freed."""
        output, leaves = self.output_and_inputs(inputs)
        self._found = None
        return _gradients_of(output, leaves, grad)


class LayerMemory:
    """What one layer's forward pass saves under selective recompute.

    Args:
        cells: Whether the mLSTM cell runs again as well.
    """

    def __init__(self, cells: bool = False) -> None:
        self.cells = cells
        # Recipes by the memory of their tensors. The memory is held too: another tensor must not
        # get it while the layer runs.
        self.recipes: dict[int, tuple[_Recipe, torch.UntypedStorage]] = {}
        # What was packed, by the tensor's id, and the tensor itself for the same reason: a kernel's
        # input is saved for its own gradient and for its recipe.
        self.packed: dict[int, tuple[Any, Tensor]] = {}

    def pack(self, tensor: Tensor) -> Any:
        """What autograd keeps for a tensor that an operation saves: a recipe's view, or itself."""
        found = self.recipes.get(memory_of(tensor))
        if found is not None:
            return _View(found[0], tensor)
        if tensor.is_leaf:
            return tensor
        if id(tensor) not in self.packed:
            # Without its node: one that saved its own output would be a reference cycle. `data` is
            # `detach` without an operator. Autograd itself checks that nobody has written it.
            self.packed[id(tensor)] = tensor.data, tensor
        return self.packed[id(tensor)][0]

    def close(self) -> None:
        """Release what is held for the forward pass alone. Autograd keeps `pack` longer."""
        self.recipes.clear()
        self.packed.clear()


_layer: LayerMemory | None = None


def is_selective() -> bool:
    """Whether the forward pass that runs now is that of a layer with selective recompute."""
    return _layer is not None


def run_again(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """`function(*inputs)`, and the gradients that follow from that of its output.

    Args:
        function: What the forward pass ran.
        inputs: What it ran on.
        needed: Which of them need a gradient; the others get None.
        grad: Gradient of the output.
    """
    inputs = [t.data.requires_grad_(need) for t, need in zip(inputs, needed, strict=True)]
    with torch.enable_grad():
        output = function(*inputs)
    return output.data, _gradients_of(output, inputs, grad)


def _gradients_of(output: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    """The gradient of each input, None where it needs none."""
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, grad) if wanted else ())
    return [next(found) if t.requires_grad else None for t in inputs]


def recompute_in_backward(
    function: Callable[..., Tensor], *inputs: Tensor, keeps_inputs_only: bool = False
) -> Tensor:
    """`function(*inputs)`, which selective recompute does not keep.

    Args:
        function: Cheap, and a function of the tensors alone: it draws no random numbers, and
            parameters are among its inputs. It runs again up to twice in the backward pass.
        inputs: Tensors that are kept (or recomputed themselves).
        keeps_inputs_only: Whether `function` is a kernel that reads each input once and keeps
            nothing but inputs. It then does not run again for its own gradient, only for what later
            operations need of its output.
    """
    if keeps_inputs_only:
        return known_output(function(*inputs), function, *inputs)
    if _layer is None:
        # Through one alias each input's gradient is summed inside first, as it is when recomputed:
        # the order of sums, and so every bit, is the same in both modes.
        return function(*(t.view_as(t) for t in inputs))
    return _remember(_Recomputed.apply(function, *inputs), function, inputs)


def known_output(output: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`output`, which is `function(*inputs)` and which selective recompute does not keep.

    Its gradient is its own. It is for a collective, which keeps nothing for its backward pass, and
    for a kernel that has other outputs too, of which `inputs` may be one.
    """
    return output if _layer is None else _remember(output, function, inputs)


def rerun_cell(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)` of a cell, which runs once more in the backward pass where cells do.

    Args:
        function: A function of the tensors alone, which draws no random numbers.
        inputs: Tensors that are kept (or recomputed themselves).
    """
    if _layer is None or not _layer.cells:
        return function(*inputs)
    rerun = _Rerun(function, [t.requires_grad for t in inputs])
    return _remember(_Rerunning.apply(rerun, *inputs), rerun.output, inputs)


@contextmanager
def selective(cells: bool = False) -> Iterator[None]:
    """The forward pass of one layer with selective recompute, and that of its cell if asked for."""
    global _layer
    before, _layer = _layer, LayerMemory(cells)
    memory = _layer
    try:
        with saved_tensors_hooks(memory.pack, _unpack):
            yield
    finally:
        memory.close()
        _layer = before


def _remember(output: Tensor, function: Callable[..., Tensor], inputs: tuple) -> Tensor:
    if memory_of(output) not in _layer.recipes:  # a gather over one rank is its input itself
        recipe = _Recipe(function, tuple(_layer.pack(i) for i in inputs))
        _layer.recipes[memory_of(output)] = recipe, output.untyped_storage()
    return output


def _unpack(packed: Any) -> Tensor:
    return packed.tensor() if isinstance(packed, _View) else packed


def memory_of(tensor: Tensor) -> int:
    """A number that tensors share exactly when they lie in the same memory."""
    return tensor.untyped_storage()._cdata


class _Recomputed(torch.autograd.Function):
    """A function whose backward pass runs it again on its inputs."""

    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        needed = ctx.needs_input_grad[1:]
        return None, *run_again(ctx.function, ctx.saved_tensors, needed, grad)[1]


class _Rerunning(torch.autograd.Function):
    """See `rerun_cell`."""

    @staticmethod
    def forward(ctx, rerun, *inputs):
        ctx.rerun = rerun
        ctx.save_for_backward(*inputs)
        return rerun.function(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, *ctx.rerun.gradients(ctx.saved_tensors, grad)
