"""Which Triton kernels a run launches, and which ones its check does: as Triton compiles them.

Both run on tensors without data. An operator of `xlstm_kernels` runs its own code on tensors that
are only shapes, and what it launches is written down instead. `test_kernel_check.py` runs this in a
process of its own: the device that does not exist must be made before the first backward pass.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from benchmarks.kernel_variants.variant import variant_of
from pretrain import layout as layouts
from pretrain.config import RunConfig, load_config
from pretrain.data import Batch
from pretrain.engines.megatron import MegatronEngine
from pretrain.guard.kernel_check import kernel_problems
from pretrain.rehearsal.device import RehearsalMode, as_rank, device
from pretrain.rehearsal.record import RankRecord
from xlstm_kernels import self_check, self_check_again, self_check_layers
from xlstm_kernels.common.launch_graph import without_graphs
from xlstm_kernels.common.triton_launch import Launch

RUN_FILES = Path(__file__).parents[3] / "pretrain" / "configs"
RAGGED = {"data.seq_len": 1000, "data.micro_batch": 2, "layout.tensor": 8}
CASES = [
    ("xlstm_7b", "MM", {}),
    ("xlstm_7b", "M", RAGGED),
    ("xlstm_7b", "M", {"layout.context": 2}),
    ("xlstm_1.3b_7to1", "ms", {}),
    ("xlstm_125m_7to1", "ms", {"layout.tensor": 2, "layout.context": 2, "data.seq_len": 512}),
    ("xlstm_350m_7to1", "s", {"memory.slstm_form": "persistent", "data.seq_len": 256}),
    ("xlstm_large_2.7b", "M", {}),
    ("mamba2_125m", "d", {}),
]


class Recorder(RehearsalMode):
    """A rehearsal that writes down the binary of every launch."""

    def __init__(self) -> None:
        super().__init__(RankRecord(0))
        self.binaries: set[tuple] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if name.startswith("xlstm_kernels::") and _is_triton(name):
            with _disable_current_modes():
                self._launch(OPDEFS[name]._init_fn, *tree_map(_meta, (args, kwargs or {})))
        return result

    def _launch(self, function, args, kwargs) -> None:
        target = SimpleNamespace(get_current_target=lambda: SimpleNamespace(arch=90))
        with (
            mock.patch.object(Launch, "run", lambda launch: self.binaries.add(binary(launch))),
            mock.patch.object(triton.runtime.driver, "_active", target),
            mock.patch.object(torch, "autocast", lambda *a, **k: nullcontext()),  # unknown there
            without_graphs(),
        ):
            function(*args, **kwargs)


def _is_triton(name: str) -> bool:
    """Whether an operator launches kernels."""
    return "triton" in name or "persistent" in name or "triton" in OPDEFS[name]._init_fn.__module__


def binary(launch: Launch) -> tuple:
    """What Triton compiles a launch by: types, constants, multiples of 16, warps and stages.

    Whether a stride is a multiple of 16 is left out: it depends on what lies beside a tensor.
    """
    one = variant_of(launch, "", "")
    facts = {name: one.constexprs.get(name, kind) for name, kind in one.signature.items()}
    aligned = tuple(name for name in one.divisible if not name.startswith("stride"))
    return launch.kernel.__name__, *facts.items(), aligned, launch.num_warps, launch.num_stages


def _meta(x):
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def of_training(config: RunConfig) -> set[tuple]:
    """Binaries of one micro-batch, forward and backward, and of a look into the cells."""
    mode = Recorder()
    layout = config.layout
    with as_rank(0, layout.tensor * layout.context, mode):
        place = layouts.start(config)
        try:
            with mode:
                engine = MegatronEngine(config, place)
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
        finally:
            place.close()
    return mode.binaries


def of_check(config: RunConfig) -> set[tuple]:
    """Binaries of the comparison before the run."""
    mode = Recorder()

    def compare(name, kernel, reference, inputs, device, *rest, gradients=True, **more):
        given = [x.to(device).requires_grad_(gradients) for x in inputs.values()]
        h = kernel(*given)
        if gradients:
            torch.autograd.grad(h, given, torch.empty_like(h))
        return []

    with (
        mock.patch.object(self_check, "compare", compare),
        mock.patch.object(self_check_again, "compare", compare),
        mock.patch.object(self_check_layers, "compare", compare),
        mock.patch.object(torch, "equal", lambda *_: True),
        as_rank(0, 1, mode),
        mode,
    ):
        kernel_problems(config, device())
    return mode.binaries


def main() -> int:
    """Compare both for every case; 1 where the check leaves out a kernel of the step."""
    lacking = 0
    for name, pattern, changes in CASES:
        keys = {"run.dir": "unused", "data.path": "unused", "model.pattern": pattern}
        run = load_config(RUN_FILES / f"{name}.yaml", keys | changes, quiet=True)
        trained, checked = of_training(run), of_check(run)
        assert trained, name
        for one in sorted(trained - checked, key=str):
            print(f"{name} {changes}: the check leaves out {one}")
            lacking += 1
    print(f"{len(CASES)} runs, {lacking} kernels that the check leaves out")
    return int(lacking > 0)


if __name__ == "__main__":
    sys.exit(main())
