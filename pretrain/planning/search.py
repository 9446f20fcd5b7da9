"""Trying layouts: the first recompute mode and micro-batch of each shape that fits, and why not."""

from pretrain.config import ConfigError, RunConfig
from pretrain.config.checks.kernels import check_gpu
from pretrain.planning.estimate import estimate
from pretrain.planning.layouts import RECOMPUTE, Layout, with_layout
from pretrain.planning.tried import Tried
from pretrain.rehearsal.gpus import Gpu


def try_shape(config: RunConfig, shape: tuple[int, int], gpus: int, gpu: Gpu) -> list[Tried]:
    """Look at one (tensor, pipeline), with less and less memory until it fits.

    Args:
        config: the run.
        shape: sizes of tensor and pipeline parallelism.
        gpus: number of GPUs.
        gpu: which.

    Returns:
        What was looked at; the last one fits, or nothing of this shape does.
    """
    tried: list[Tried] = []
    for micro_batch in dict.fromkeys((config.data.micro_batch, 1)):
        for recompute in RECOMPUTE:
            layout = Layout(*shape, recompute, micro_batch)
            try:
                changed = with_layout(config, layout, gpus)
                check_gpu(changed, gpu)
            except ConfigError as error:
                why_not = _reason(error)
                if all(one.why_not != why_not for one in tried):  # another micro-batch may help
                    tried.append(Tried(layout, why_not=why_not))
                break  # recomputation changes nothing about it
            found = estimate(changed, gpus, gpu)
            if found.free >= 0:
                return [*tried, Tried(layout, changed, found)]
            missing = f"needs {-found.free / 1e9:.1f} GB more than {gpu.name} has"
            tried.append(Tried(layout, changed, found, missing))
    return tried


def _reason(error: ConfigError) -> str:
    """The first problem of a message, without its remedies."""
    lines = [line.removeprefix("  - ") for line in str(error).splitlines()]
    return (lines[1] if len(lines) > 1 else lines[0]).partition(";")[0]
