"""Counting the memory that forward passes keep for their backward passes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from xlstm_mcore.recompute import LayerMemory, memory_of


class SavedMemory:
    """Memory that autograd holds: whole storages, each counted once.

    Args:
        ignore: Tensors whose memory is there anyway (parameters).
    """

    def __init__(self, ignore: Iterable[Tensor]) -> None:
        self._ignored = {memory_of(t) for t in ignore}
        self._held: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: Tensor) -> None:
        """Count the memory of a saved tensor."""
        if memory_of(tensor) not in self._ignored:
            self._held[memory_of(tensor)] = tensor.untyped_storage()

    @property
    def bytes(self) -> int:
        """Bytes held so far."""
        return sum(storage.nbytes() for storage in self._held.values())


@contextmanager
def count_saved(ignore: Iterable[Tensor] = ()) -> Iterator[SavedMemory]:
    """Count what the forward passes in the block keep for their backward passes.

    torch calls only the innermost hooks for saved tensors. Inside a layer with selective recompute
    those are the layer's own, so they are wrapped for as long as the block runs.

    Args:
        ignore: Tensors that are not counted, such as the model's parameters.
    """
    saved = SavedMemory(ignore)
    packed_by_layer = LayerMemory.pack

    def pack_in_layer(layer: LayerMemory, tensor: Tensor) -> object:
        packed = packed_by_layer(layer, tensor)
        if isinstance(packed, Tensor):  # not a recipe
            saved.add(tensor)
        return packed

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor)
        return tensor if tensor.is_leaf else tensor.detach()

    with (
        mock.patch.object(LayerMemory, "pack", pack_in_layer),
        saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        yield saved
