"""The model on a device that does not exist: run by test_accelerator.py in a process of its own.

Fake tensors have a device but no data, and raise where two devices meet, so what would only fail on
a GPU (a mask made on the CPU, a state left there) fails here, and so does a layer that makes the
host wait. The pipeline's messages and the
optimizer are rehearsed elsewhere (tests/pretrain/rehearsal).
"""

import sys
import traceback

import torch
import torch.distributed as dist
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._pytree import tree_leaves

from pretrain import layout as layouts
from pretrain.config import config_from_dict
from pretrain.rehearsal.device import NAME, RehearsalMode, as_rank, device
from pretrain.rehearsal.record import RankRecord
from xlstm_mcore.build import build_model, make_config
from xlstm_mcore.layer import XLSTMLayer, layer_spec
from xlstm_mcore.mixers.attention import know_documents

ROWS = 2
SINGLE = [
    {"pattern": pattern, "backend": backend, "tied": tied, "memory": memory}
    for pattern in ("M", "m", "s", "*", "Mms")
    for backend, tied, memory in (
        ("torch", False, {"recompute": "selective"}),
        ("triton", True, {"logits_mib": 1, "recompute": "full"}),
    )
]
SPLIT = [
    {"pattern": "Mms*", "layout": {"tensor": 2, "sequence": True}, "world": 2, "rank": 1},
    {"pattern": "Mms", "layout": {"tensor": 2}, "precision": "bf16", "world": 4, "rank": 2},
    {"pattern": "Mms*", "layout": {"context": 4}, "world": 4, "rank": 0},
    {"pattern": "Mms", "layout": {"context": 4}, "world": 4, "rank": 3, "backend": "triton"},
    {"pattern": "Mm", "layout": {"context": 16}, "world": 16, "rank": 7, "length": 64},
    {
        "pattern": "Mms",
        "layout": {"tensor": 2, "sequence": True, "context": 2},
        "precision": "bf16",
        "world": 4,
        "rank": 3,
        "backend": "triton",
    },
]


class Accelerator(RehearsalMode):
    """Our torch operators run, and not their fakes: they too must stay on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("xlstm_kernels::") and "_torch" in name:
            with self:
                return OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def run(
    pattern, backend="torch", tied=False, precision="fp32", layout=None, memory=None,
    world=1, rank=0, length=16,
):  # fmt: skip
    """Forward and backward with boundaries, then a prompt and a step."""
    layout = layout or {}
    model = {"pattern": pattern, "hidden_size": 64, "num_heads": 4, "vocab_size": 128}
    model |= {"round_up_to": 16, "tie_embeddings": tied, "kernel_backend": backend, "dropout": 0.1}
    data = {"path": "unused", "seq_len": length, "global_batch": 2 * world, "micro_batch": 2}
    sections = {"model": model, "layout": layout, "data": data, "memory": memory or {}}
    config = config_from_dict({"run": {"dir": "unused", "steps": 1}, **sections})
    mode = Accelerator(RankRecord(rank))
    with as_rank(rank, world, mode):
        place = layouts.start(config)
        try:
            with mode:
                check(place, model, precision, layout, memory, length)
            # The sLSTM in PyTorch looks where documents start; GPUs have kernels for it.
            waits = [w for w in mode.record.waits if "slstm/torch" not in str(w.stack)]
            assert not waits, waits
        finally:
            place.close()


def check(place, model, precision, layout, memory, length):
    """The model of one rank, with process groups."""
    built = make_config(model, precision=precision, layout=layout, memory=memory)
    (network,) = build_model(built, place.groups, seed=0)
    own = length // layout.get("context", 1)
    tokens = torch.randint(0, 128, (ROWS, own), device=device())
    boundaries = torch.rand(ROWS, length, device=device()) < 0.1
    know_documents(boundaries, torch.rand(ROWS, length) < 0.1)  # the loader has them on the host
    network.train()
    network(tokens, boundaries, tokens).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.device == device(), name
        assert parameter.grad is not None, name
        assert parameter.grad.device == device(), name
    if not built.sequence_parallel and built.context_parallel_size == 1:
        network.eval()
        with torch.no_grad():
            cache: dict = {}
            network(tokens, cache=cache, last_only=True)
            logits = network(tokens[:, :1], cache=cache)
        assert logits.device == device()


class Capture(RehearsalMode):
    """While `active`, raises at what the capture of a CUDA graph does not allow.

    That is every operator whose result on the host, or whose shape, depends on values on the
    device, and every copy between device and host. The rest are kernels with arguments that the
    graph plays again.
    """

    active = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        on_device = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.device == device()]
        if self.active and on_device and tags & set(func.tags):
            raise NotCapturable(func._schema.name)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.active and func._schema.name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if func._schema.name == "aten::copy_" else args[0]
            if source.device != result.device:
                raise NotCapturable(f"{func._schema.name} from {source.device}")
        return result


class NotCapturable(Exception):
    """What a graph cannot hold."""


def capture(letter, recompute, fault=None):
    """A layer's forward and backward pass, once to warm up and once as if it were captured."""
    model = {"pattern": letter, "hidden_size": 64, "num_heads": 4, "vocab_size": 128}
    model |= {"round_up_to": 16, "kernel_backend": "triton"}
    data = {"path": "unused", "seq_len": 16, "global_batch": 2, "micro_batch": 2}
    config = config_from_dict({"run": {"dir": "unused", "steps": 1}, "model": model, "data": data})
    built = make_config(model, precision="bf16", memory={"recompute": recompute})
    mode = Capture(RankRecord(0))
    with as_rank(0, 1, mode):
        place = layouts.start(config)
        try:
            with mode:
                spec = layer_spec(letter, built).submodules
                layer = XLSTMLayer(built, spec, place.groups, layer_number=0).train()
                shape, new = (16 * ROWS, 64), {"device": device()}
                x = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True, **new)
                starts = torch.zeros(ROWS, 16, dtype=torch.bool, **new)
                for mode.active in (False, True):
                    y = layer(x, ROWS, starts)
                    y = fault(y) if fault else y
                    y.backward(torch.empty_like(y))
                mode.active = False
        finally:
            place.close()


FAULTS = {
    "aten::_local_scalar_dense": lambda y: y if y.sum() > 0 else -y,
    "aten::index": lambda y: y[y > 0],
    "aten::_to_copy from cpu": lambda y: y * torch.tensor([2.0], device=y.device),
    f"aten::_to_copy from {NAME}:0": lambda y: y * y.detach().cpu().shape[0],
}


def captures() -> int:
    """Whether the blocks of the papers' large models can be captured, and faults are noticed."""
    for letter in "Mm":
        for recompute in ("none", "selective"):
            capture(letter, recompute)
    for name, fault in FAULTS.items():
        try:
            capture("M", "none", fault)
        except NotCapturable as found:
            assert str(found) == name, found
        else:
            raise AssertionError(f"{name} was not noticed")
    return 4 + len(FAULTS)


def main() -> int:
    """Run every case; 1 when one failed, with what failed."""
    failed = 0
    print(f"{captures()} captures as expected")
    for case in SINGLE + SPLIT:
        try:
            run(**case)
        except Exception:
            failed += 1
            print(f"{case}:\n{traceback.format_exc()}")
            if dist.is_initialized():
                layouts.leave()
    print(f"{len(SINGLE + SPLIT) - failed} cases passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
