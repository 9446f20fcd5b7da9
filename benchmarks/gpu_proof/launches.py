"""What the proof launches: the parts run at their real sizes, on tensors without data.

Triton compiles a kernel for dtypes, multiples of 16 among sizes and strides, and constants that
follow from a length. So the archive for a machine without a network must have these very kernels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks import kernels_gpu
from benchmarks.counting.recorded_launches import LaunchRecorder
from benchmarks.gpu_proof import correctness, slstm, steps, times, training
from benchmarks.gpu_proof.setting import Setting
from benchmarks.kernel_variants import Variant
from pretrain import layout as layouts
from pretrain.config import RunConfig, config_from_dict
from pretrain.rehearsal.device import as_rank, device


class Rehearsed(Setting):
    """The proof on the device that does not exist; with `dry` the sizes of the sanitizer."""

    backend = "triton"

    @property
    def device(self) -> str:
        """Where tensors are made."""
        return str(device())


def proof_variants() -> list[Variant]:
    """Every kernel that the proof launches on an H100, once."""
    recorder, real = LaunchRecorder(), Rehearsed(Path("unused"), False)
    with as_rank(0, 1, recorder), recorder:
        for setting in (real, Rehearsed(Path("unused"), True)):
            for _, _, function, inputs in correctness.cases(setting):
                correctness.differentiate(function, setting.backend, inputs)
        with _timed_once():
            for part in (times, slstm):
                list(part.rows(real))
    run = config_from_dict(training.run_of(real))
    for recompute in ("selective", "none", "full"):
        _train(recorder, steps.config_of(real, 1, recompute))
    _train(recorder, run)
    with as_rank(0, 1, recorder), recorder:
        recorder.check(run)
    return list(recorder.variants.values())


def _train(recorder: LaunchRecorder, config: RunConfig) -> None:
    with as_rank(0, 1, recorder):
        layout = layouts.start(config)
        try:
            with recorder:
                recorder.train(config, layout)
        finally:
            layout.close()


@contextmanager
def _timed_once() -> Iterator[None]:
    """Every call that would be timed is one forward and backward pass; peers are left out."""

    def once(function: Callable, inputs: list[Tensor], _device: str) -> dict:
        kernels_gpu.forward_backward(function, inputs)
        return {}

    host = torch.Generator
    with (
        mock.patch.object(kernels_gpu, "time_call", once),
        mock.patch.object(kernels_gpu, "peers", lambda _size: {}),
        mock.patch.object(slstm, "time_call", once),
        mock.patch.object(slstm, "_graph_ms", lambda *_: 0.0),
        mock.patch.object(torch, "Generator", lambda *_: host()),
    ):
        yield
