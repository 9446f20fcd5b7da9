"""Counting device memory by kind, from the storages of tensors as they come and go."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pretrain.engines.megatron import MegatronEngine
from pretrain.rehearsal.record import Memory

WEIGHTS = "weights"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer state"
STATES = "cell states"
LOGITS = "logits and loss"
MESSAGES = "messages"
BACKWARD = "backward pass"
GRAPHS = "sLSTM's graphs"  # the buffers that they work on
GATHERED = "gathered weights"  # of ZeRO stage 3, while a module needs them
OTHER = "other"
# What lasts for the whole run; a tensor of these kinds keeps its kind.
LASTING = (WEIGHTS, GRADIENTS, OPTIMIZER)


def activations_of(letter: str) -> str:
    """The kind of what the forward pass of blocks with this letter leaves behind."""
    return f"activations of {letter}"


class MemoryMeter:
    """Live bytes by kind, and what was there when there was most.

    A storage gets the kind that `kind` has when it is first seen. It counts until it is freed,
    however many tensors lie in it.

    Args:
        device: the type of the device whose memory is counted.

    Attributes:
        kind: of the storages that are seen next.
        live: bytes by kind.
    """

    def __init__(self, device: str) -> None:
        self.device, self.kind = device, OTHER
        self.live: Counter[str] = Counter()
        self._storages: dict[int, tuple[int, str, weakref.ref]] = {}
        self._total = self._peak = 0
        self._at_peak: dict[str, int] = {}

    def see(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count a tensor's storage, if it is new."""
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size, kind = storage.nbytes(), kind or self.kind
        if kind == OTHER and torch._C._current_autograd_node() is not None:
            kind = BACKWARD
        gone = weakref.ref(storage, lambda _, key=key: self._free(key))
        self._storages[key] = size, kind, gone
        self.reserve(size, kind)

    def reserve(self, size: int, kind: str) -> None:
        """Count bytes; those that lie in no tensor of the rehearsal stay for the whole run."""
        self.live[kind] += size
        self._total += size
        if self._total > self._peak:
            self._peak, self._at_peak = self._total, dict(self.live)

    def claim(self, tensor: Tensor, kind: str, only: str | None = None) -> None:
        """Give a tensor's storage another kind; with `only`, if it has that one."""
        self.see(tensor)
        key = tensor.untyped_storage()._cdata
        found = self._storages.get(key)
        if found is None or found[1] in LASTING or only not in (None, found[1]):
            return
        size, old, gone = found
        self._storages[key] = size, kind, gone
        self.live[old] -= size
        self.live[kind] += size

    def start_peak(self) -> None:
        """Forget the peak so far."""
        self._peak, self._at_peak = self._total, dict(self.live)

    def result(self) -> Memory:
        """The peak since `start_peak`, and what is there now."""
        return Memory(self._peak, _positive(self._at_peak), _positive(self.live))

    @contextmanager
    def of_kind(self, kind: str) -> Iterator[None]:
        """What is first seen inside is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def watch(self, module: nn.Module, kind: str) -> None:
        """What a module's forward pass makes is of this kind."""
        before: list[str] = []

        def enter(*_: object) -> None:
            before.append(self.kind)
            self.kind = kind

        def leave(*_: object) -> None:
            self.kind = before.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def _free(self, key: int) -> None:
        size, kind, _ = self._storages.pop(key)
        self.live[kind] -= size
        self._total -= size


def _positive(kinds: dict[str, int]) -> dict[str, int]:
    return {kind: size for kind, size in kinds.items() if size > 0}


def watch_model(meter: MemoryMeter, models: list[nn.Module]) -> None:
    """Tell which block's forward pass makes which activations.

    Args:
        meter: counts.
        models: this rank's model chunks, `XLSTMModel`.
    """
    for model in models:
        letters = model.config.layer_letters
        for layer in model.decoder.layers:
            meter.watch(layer, activations_of(letters[layer.layer_number]))
        if model.post_process:
            meter.watch(model.output_layer, LOGITS)


def claim_lasting(meter: MemoryMeter, engine: MegatronEngine) -> None:
    """Tell apart the weights, the gradients and the optimizer's state."""
    for model_chunk in engine.model_chunks:
        for parameter in model_chunk.parameters():
            meter.claim(parameter.data, WEIGHTS)
            meter.claim(parameter.main_grad, GRADIENTS)
    for _, part in engine.optimizer.slices():
        meter.claim(part.tensor, OPTIMIZER)
