"""Which Triton kernels code launches, as Triton compiles them, found out without a GPU.

The code runs on tensors without data. An operator of `xlstm_kernels` runs its own code on tensors
that are only shapes, and what it launches is written down instead.
"""

from collections.abc import Hashable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from benchmarks.counting.counted_ops import ARCHITECTURE
from benchmarks.kernel_variants.variant import Variant, variant_of
from pretrain.config import RunConfig
from pretrain.data import Batch
from pretrain.engines.megatron import MegatronEngine
from pretrain.guard.kernel_check import kernel_problems
from pretrain.layout import Layout
from pretrain.rehearsal.device import RehearsalMode, device
from pretrain.rehearsal.record import RankRecord
from xlstm_kernels import self_check, self_check_again, self_check_layers
from xlstm_kernels.common.launch_graph import without_graphs
from xlstm_kernels.common.triton_launch import Launch


def facts_of(variant: Variant) -> Hashable:
    """What Triton compiles a kernel by: types, constants, multiples of 16, warps and stages."""
    kinds = {name: variant.constexprs.get(name, kind) for name, kind in variant.signature.items()}
    options = variant.num_warps, variant.num_stages, variant.cooperative
    return variant.fn.__name__, *kinds.items(), tuple(variant.aligned()), options


class LaunchRecorder(RehearsalMode):
    """A rehearsal that writes down what every launch is compiled as.

    Attributes:
        variants: by `facts_of`.
    """

    def __init__(self) -> None:
        super().__init__(RankRecord(0))
        self.variants: dict[Hashable, Variant] = {}
        self._seen: set[Hashable] = set()  # without a look at what it is compiled as

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run one operator on tensors without data, and write down its launches."""
        name = func._schema.name
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if name.startswith("xlstm_kernels::") and _is_triton(name):
            with _disable_current_modes():
                self._launch(OPDEFS[name]._init_fn, *tree_map(_meta, (args, kwargs or {})))
        return result

    def _launch(self, function: Any, args: tuple, kwargs: dict) -> None:
        target = SimpleNamespace(get_current_target=lambda: SimpleNamespace(arch=ARCHITECTURE))
        with (
            mock.patch.object(Launch, "run", lambda launch: self._write_down(launch)),
            mock.patch.object(triton.runtime.driver, "_active", target),
            mock.patch.object(torch, "autocast", lambda *a, **k: nullcontext()),  # unknown there
            without_graphs(),
        ):
            function(*args, **kwargs)

    def _write_down(self, launch: Launch) -> None:
        plain = {one.name for one in launch.kernel.params if one.do_not_specialize}
        key = launch.kernel, *((k, _seen(x)) for k, x in launch.arguments.items() if k not in plain)
        if key not in self._seen:  # the sLSTM has a launch for each step
            self._seen.add(key)
            variant = variant_of(launch, str(len(self.variants)), "")
            self.variants.setdefault(facts_of(variant), variant)

    def train(self, config: RunConfig, layout: Layout) -> None:
        """One micro-batch, forward and backward, and a look into the cells."""
        engine = MegatronEngine(config, layout)
        shape = config.data.micro_batch, config.data.seq_len
        tokens = torch.zeros(shape, dtype=torch.int64)
        marks = torch.zeros(shape, dtype=torch.bool)
        no_sources = torch.zeros(len(tokens), 0, dtype=torch.float64)
        batch = Batch(tokens, tokens, torch.ones(shape), marks, no_sources)
        engine._run([batch], forward_only=False)
        for layer in (one for model in engine.models for one in model.decoder.layers):
            layer.mixer.observe = lambda seen: None  # as `logging.cells` does
        engine._run([batch], forward_only=True)
        engine.close()

    def check(self, config: RunConfig) -> None:
        """The comparison before a run."""
        with (
            mock.patch.object(self_check, "compare", _compare),
            mock.patch.object(self_check_again, "compare", _compare),
            mock.patch.object(self_check_layers, "compare", _compare),
            mock.patch.object(torch, "equal", lambda *_: True),
        ):
            kernel_problems(config, device())


def _compare(
    name: str,
    kernel: Any,
    reference: Any,
    inputs: dict[str, Tensor],
    device: torch.device,
    *rest: Any,
    gradients: bool = True,
    **more: Any,
) -> list[str]:
    """The kernel's part of `self_check.compare`."""
    given = [x.to(device).requires_grad_(gradients) for x in inputs.values()]
    h = kernel(*given)
    if gradients:
        torch.autograd.grad(h, given, torch.empty_like(h))
    return []


def _is_triton(name: str) -> bool:
    """Whether an operator launches kernels."""
    return "triton" in name or "persistent" in name or "triton" in OPDEFS[name]._init_fn.__module__


def _seen(x: Any) -> Hashable:
    return (x.dtype, x.storage_offset()) if isinstance(x, Tensor) else x


def _meta(x: Any) -> Any:
    """A tensor that lies in memory as `x` does, without memory."""
    if not isinstance(x, Tensor):
        return x
    whole = torch.empty(x.untyped_storage().nbytes() // x.itemsize, dtype=x.dtype, device="meta")
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())
