"""Activation recompute: what the backward pass computes again instead of finding it in memory.

*Full*: a layer keeps its input alone and runs its forward pass twice (Megatron's checkpoint, which
replays the random states of both of its generators).

*Selective*: a layer keeps what its matrix products and cells need and made, but not what follows
from that at the cost of reading it: norms, the activation of the feed-forward part, output gates,
fp32 copies, and what sequence parallelism gathered. Autograd saves such a tensor twice, as an input
or output of the cheap operation and again as the factor of the next matrix product, so making the
operation a checkpoint is not enough: `recomputed` also leaves a recipe wherever a later
operation of the layer saves its output.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

MODES = ("none", "selective", "full")


class _Recipe:
    """How to make a tensor again. It is made once for all that are known to need it."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        self.function, self.inputs = function, inputs
        self.uses = 0
        self._value: Tensor | None = None

    def value(self) -> Tensor:
        """The tensor; the last of the expected uses forgets it."""
        value = self._value
        if value is None:
            with torch.no_grad():
                value = self.function(*(_unpack(i) for i in self.inputs))
        self.uses -= 1
        self._value = value if self.uses > 0 else None
        return value


class _View:
    """A saved tensor that lies in the memory of a recipe's."""

    def __init__(self, recipe: _Recipe, tensor: Tensor) -> None:
        recipe.uses += 1
        self.recipe = recipe
        self.place = tensor.size(), tensor.stride(), tensor.storage_offset()


class _Layer:
    """The forward pass of one layer: recipes by the memory of their tensors."""

    def __init__(self) -> None:
        # The tensor is held too: another one must not get its memory while the layer runs.
        self.recipes: dict[int, tuple[_Recipe, Tensor]] = {}

    def pack(self, tensor: Tensor) -> Any:
        found = self.recipes.get(_memory(tensor))
        if found is not None:
            return _View(found[0], tensor)
        if _counter is not None:
            _counter.add(tensor)
        # A node that held its own output, as it is, would never be freed.
        return tensor if tensor.is_leaf else tensor.detach()


_layer: _Layer | None = None


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)`, which selective recompute does not keep.

    Args:
        function: cheap and a function of the tensors alone: no random numbers, and parameters among
            its inputs. It runs again up to twice in the backward pass.
        inputs: tensors that are kept (or recomputed themselves).
    """
    if _layer is None:
        # Through one alias each input's gradient is summed inside first, as it is when recomputed:
        # the order of sums, and so every bit, is the same in both modes.
        return function(*(t.view_as(t) for t in inputs))
    return _remember(_Recomputed.apply(function, *inputs), function, inputs)


def regathered(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)` of a collective that keeps nothing for its own backward pass.

    Selective recompute repeats it in the backward pass where its output is needed again, instead of
    holding the whole sequence on every rank, and differentiates it as it is.
    """
    if _layer is None:
        return function(x)
    return _remember(function(x), function, (x,))


@contextmanager
def selective() -> Iterator[None]:
    """The forward pass of one layer with selective recompute."""
    global _layer
    before, _layer = _layer, _Layer()
    try:
        with saved_tensors_hooks(_layer.pack, _unpack):
            yield
    finally:
        _layer = before


def _remember(output: Tensor, function: Callable[..., Tensor], inputs: tuple) -> Tensor:
    if _memory(output) not in _layer.recipes:  # a gather over one rank is its input itself
        recipe = _Recipe(function, tuple(_layer.pack(i) for i in inputs))
        _layer.recipes[_memory(output)] = recipe, output.detach()
    return output


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, _View):
        return packed.recipe.value().as_strided(*packed.place)
    return packed


def _memory(tensor: Tensor) -> int:
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
        inputs = [
            t.detach().requires_grad_(need)
            for t, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            output = ctx.function(*inputs)
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, grad))
        return None, *(next(found) if need else None for need in needed)


class Saved:
    """Memory that autograd holds: whole storages, each counted once.

    Args:
        ignore: tensors whose memory is there anyway (parameters).
    """

    def __init__(self, ignore: Iterable[Tensor]) -> None:
        self._ignored = {_memory(t) for t in ignore}
        self._held: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: Tensor) -> None:
        """Count the memory of a saved tensor."""
        if _memory(tensor) not in self._ignored:
            self._held[_memory(tensor)] = tensor.untyped_storage()

    @property
    def bytes(self) -> int:
        """Bytes held so far."""
        return sum(storage.nbytes() for storage in self._held.values())


_counter: Saved | None = None


@contextmanager
def count_saved(ignore: Iterable[Tensor] = ()) -> Iterator[Saved]:
    """Count what the forward passes in the block keep for their backward passes.

    Args:
        ignore: tensors that are not counted, such as the model's parameters.
    """
    global _counter
    _counter = counter = Saved(ignore)

    def pack(tensor: Tensor) -> Tensor:
        counter.add(tensor)
        return tensor if tensor.is_leaf else tensor.detach()

    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield counter
    finally:
        _counter = None
