"""Memory of small runs, counted alike on real tensors and in a rehearsal: by kind, in bytes.

As a program it prints what the rehearsals count, as JSON. The device that does not exist stays
registered with torch for the life of a process, so this is one of its own.
"""

import json
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain import layout as layouts
from pretrain.config import RunConfig
from pretrain.engines.megatron import MegatronEngine
from pretrain.rehearsal import device as rehearsed
from pretrain.rehearsal.device import RehearsalMode, as_rank
from pretrain.rehearsal.memory import LASTING, MemoryMeter, claim_lasting, watch_model
from pretrain.rehearsal.record import RankRecord
from tests.dist import work
from xlstm_mcore.megatron.first_import import import_megatron

ACTIVATIONS = "activations"
SIZES = {
    "large": {"model__hidden_size": 64, "data__seq_len": 24},
    "classic": {"model__hidden_size": 128, "data__seq_len": 32, "memory__recompute": "selective"},
    "mixed": {"model__hidden_size": 192, "data__seq_len": 48, "memory__recompute": "full"},
}
# With the number of processes; data-parallel ones share the optimizer's state out.
LAYOUTS = {
    "alone": (1, {}),
    "tensor": (2, {"layout__tensor": 2, "layout__sequence": True}),
    "data": (2, {}),
}


def memory_of(size: str, layout: str, mode: "LiveMemory | RehearsalMode") -> dict[str, int]:
    """Lasting memory of this rank, and what the forward pass has left when the loss is there."""
    config = config_of(size, layout)
    place = layouts.start(config)
    after_forward = []
    try:
        with mode:
            engine = MegatronEngine(config, place)
            claim_lasting(mode.meter, engine)
            watch_model(mode.meter, engine.models)
            engine.models[-1].output_layer.register_forward_hook(
                lambda *_: after_forward.append(dict(mode.meter.live))
            )
            engine.forward_backward(work.random_batches(config, 0)[:1])
            engine.close()
    finally:
        place.close()
    (live,) = after_forward
    activations = sum(size for kind, size in live.items() if kind not in (*LASTING, "other"))
    return {kind: live[kind] for kind in LASTING} | {ACTIVATIONS: activations}


def config_of(size: str, layout: str) -> RunConfig:
    """A run of one size on one layout."""
    plain = {"model__kernel_backend": "torch", "engine__precision": "fp32"}
    return work.run_config(size, **plain, **SIZES[size], **LAYOUTS[layout][1])


class LiveMemory(TorchDispatchMode):
    """Counts the storages of real tensors on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.meter = MemoryMeter("cpu")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.meter.see(tensor)
        return result


def live(size: str, layout: str) -> dict[str, int]:
    """What this rank takes on real tensors; called by all ranks of the layout."""
    return memory_of(size, layout, LiveMemory())


def counted(layout: str) -> dict[str, dict[str, int]]:
    """The same of rank 0 in a rehearsal, by size."""
    found = {}
    for size in SIZES:
        mode = RehearsalMode(RankRecord(0))
        with as_rank(0, LAYOUTS[layout][0], mode):
            found[size] = memory_of(size, layout, mode)
    return found


if __name__ == "__main__":
    import_megatron()
    rehearsed.device()  # before the first backward pass, which counts the devices that there are
    json.dump({layout: counted(layout) for layout in LAYOUTS}, sys.stdout)
