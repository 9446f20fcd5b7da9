"""`python -m pretrain plan`: which layouts fit a number of GPUs, and how fast they can be."""

import argparse
import multiprocessing
import os
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat

from pretrain.config import RunConfig, save_config
from pretrain.config.checks.kernels import on_pytorch
from pretrain.planning.layouts import shapes
from pretrain.planning.tried import Tried, ranked
from pretrain.rehearsal.gpus import RESERVE, Gpu, gpu_named
from pretrain.rehearsal.report import table
from xlstm_io.errors import ConfigError, ExitCode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="their name, such as h100")
    parser.add_argument(
        "--network",
        type=float,
        metavar="GBS",
        help="GB/s that a node of 8 GPUs sends to others (default: a network that fits the GPU)",
    )
    parser.add_argument("--write", metavar="FILE", help="write the run with the best layout here")


def run(options: argparse.Namespace, config: RunConfig, overrides: list[str]) -> int:
    """Try layouts with parsed options and print them, the fastest first.

    All of the run but its layout, recompute mode and micro-batch is kept.

    Returns:
        0, or `ExitCode.REFUTED` when no layout fits.

    Raises:
        ConfigError: the GPU is not known, or there is none; or the engine is not Megatron's.
    """
    gpus, network, write = options.gpus, options.network, options.write
    gpu = gpu_named(options.gpu)
    if config.engine.name != "megatron":
        raise ConfigError(
            f"engine.name={config.engine.name} is not planned for: the plan's count of messages is "
            "that of engine.name=megatron; use it, or `rehearse` a layout of your own"
        )
    if gpus < 1:
        raise ConfigError(f"--gpus={gpus} leaves nothing to train on; use 1 or more")
    if network is not None:
        if not network > 0:
            raise ConfigError(f"--network={network:g} sends nothing; give GB/s of a node")
        gpu = gpu.with_network(network)
    tried = plan(config, gpus, gpu)
    print("\n".join(_text(tried, gpus, gpu, config)))
    best = tried[0]
    if best.config is None or best.why_not:
        return ExitCode.REFUTED
    if write is not None:
        save_config(best.config, write)
        print(f"wrote {write} with {best.layout}")
        print(f"look at it: python -m pretrain check {shlex.quote(write)} --nproc {gpus}")
    return ExitCode.DONE


def plan(config: RunConfig, gpus: int, gpu: Gpu, jobs: int | None = None) -> list[Tried]:
    """Every layout that was looked at, the best first.

    Args:
        config: the run.
        gpus: number of GPUs.
        gpu: which.
        jobs: processes at the same time; None for one per core.
    """
    possible = [shape for shape in shapes() if gpus % (shape[0] * shape[1]) == 0]
    jobs = jobs or len(os.sched_getaffinity(0))
    arguments = (repeat(config), possible, repeat(gpus), repeat(gpu))
    if jobs == 1:
        found = list(map(_try_shape, *arguments))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            found = list(pool.map(_try_shape, *arguments))
    return ranked([one for tried in found for one in tried])


def _try_shape(config: RunConfig, shape: tuple[int, int], gpus: int, gpu: Gpu) -> list[Tried]:
    """Runs in a process that may be fresh."""
    from xlstm_mcore.megatron.first_import import import_megatron

    import_megatron()
    from pretrain.planning.search import try_shape

    return try_shape(config, shape, gpus, gpu)


def _text(tried: Sequence[Tried], gpus: int, gpu: Gpu, config: RunConfig) -> Iterator[str]:
    precision = config.engine.precision
    yield (
        f"{gpus} x {gpu.name}: {gpu.memory / 1e9:.0f} GB each, {RESERVE / 1e9:.0f} GB of them for "
        f"the driver, NCCL and gaps; {gpu.tflops:,.0f} TFLOP/s; {gpu.gbs_node:.0f} GB/s in a node, "
        f"{gpu.gbs_network:g} GB/s between nodes"
    )
    yield "the speed is a bound that nobody has measured"
    if precision != "bf16":
        yield f"and that of bf16: engine.precision={precision} is several times slower than it"
    yield from on_pytorch(config)
    yield ""
    rows = [[
        "tensor", "pipeline", "recompute", "micro", "peak GB", "free GB", "tokens/s", "MFU",
        "step s", "bubble", "messages", "gradients",
    ]]  # fmt: skip
    for one in tried:
        if one.estimate is not None and not one.why_not:
            rows.append(_row(one))
    if len(rows) == 1:
        yield "NO LAYOUT FITS"
    else:
        yield from table(rows)
        yield "seconds of a step: bubble of the pipeline, messages of tensors and stages, gradients"
        yield "and weights beyond what a micro-batch hides"
    lost = [one for one in tried if one.why_not]
    if lost:
        yield ""
        yield "not possible:"
        yield from (f"  {one.layout}: {one.why_not}" for one in lost)


def _row(one: Tried) -> list[str]:
    found, layout = one.estimate, one.layout
    assert found is not None
    seconds = found.seconds
    return [
        str(layout.tensor),
        str(layout.pipeline),
        layout.recompute,
        str(layout.micro_batch),
        _number(sum(found.memory.values()) / 1e9, 1),
        _number(found.free / 1e9, 1),
        f"{found.tokens_per_second:,.0f}",
        f"{found.mfu:.1%}",
        _number(sum(seconds.values()), 2),
        _number(seconds["bubble"], 2),
        _number(seconds["tensor messages"] + seconds["stage messages"], 2),
        _number(seconds["gradients and weights"], 2),
    ]


def _number(value: float, digits: int) -> str:
    """With so many digits after the point; two that say something where those would be zeros."""
    return f"{value:.{digits}f}" if value == 0 or value >= 0.1 else f"{value:.2g}"
