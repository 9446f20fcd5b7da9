"""`python -m pretrain rehearse`: any rank of a large run, on a laptop, before a GPU is held."""

import argparse
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

from pretrain.config import RunConfig, check_world, data_parallel_size
from pretrain.config.checks.kernels import check_gpu
from pretrain.rehearsal.compare import compare_ranks, compare_saved
from pretrain.rehearsal.gpus import Gpu, gpu_named
from pretrain.rehearsal.record import RankRecord
from pretrain.rehearsal.report import Rehearsal
from xlstm_io.errors import ConfigError, ExitCode

_RANKS_PER_PROCESS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--world", type=int, required=True, metavar="N", help="ranks that the run would have"
    )
    parser.add_argument(
        "--ranks",
        default="corners",
        metavar="RANKS",
        help="all, numbers with commas, or corners: all places of the first and the last replica",
    )
    parser.add_argument("--gpu", metavar="NAME", help="whose memory must hold it, such as h100")
    parser.add_argument("--json", metavar="FILE", help="write all messages to this file")


def run(options: argparse.Namespace, config: RunConfig, overrides: list[str]) -> int:
    """Rehearse ranks of a run with parsed options, compare them and print what was found.

    Returns:
        0 when the ranks agree and fit the GPU, else `ExitCode.REFUTED`.

    Raises:
        ConfigError: the world, the ranks or the GPU do not fit the run.
    """
    gpu = None if options.gpu is None else gpu_named(options.gpu)
    if gpu is not None:
        check_gpu(config, gpu)
    ranks = chosen_ranks(config, options.world, options.ranks)
    done = rehearse(config, options.world, ranks, gpu)
    print(done.text())
    if options.json is not None:
        Path(options.json).write_text(json.dumps(done.as_json()), encoding="utf-8")
    return ExitCode.REFUTED if done.mismatches or done.too_large else ExitCode.DONE


def rehearse(
    config: RunConfig,
    world: int,
    ranks: Sequence[int],
    gpu: Gpu | None = None,
    jobs: int | None = None,
) -> Rehearsal:
    """Rehearse some ranks and compare them.

    Args:
        config: the run.
        world: the number of ranks.
        ranks: which to rehearse.
        gpu: whose memory must hold them, or None.
        jobs: processes at the same time; None for one per core.
    """
    # A process takes as long to start as the rehearsal of a small rank.
    jobs = min(jobs or len(os.sched_getaffinity(0)), -(-len(ranks) // _RANKS_PER_PROCESS))
    if jobs == 1:
        records = [_rehearse_rank(config, rank, world) for rank in ranks]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            records = list(
                pool.map(_rehearse_rank, [config] * len(ranks), ranks, [world] * len(ranks))
            )
    mismatches = compare_ranks(records) + compare_saved(records, len(records) == world)
    return Rehearsal(config, world, gpu, records, mismatches)


def chosen_ranks(config: RunConfig, world: int, text: str) -> list[int]:
    """The ranks that a user asks for.

    Args:
        config: the run.
        world: the number of ranks.
        text: "all", "corners" or numbers with commas. Corners are all tensor-, pipeline- and
            context-parallel places of the first and the last replica.

    Raises:
        ConfigError: `text` is none of these, or the world does not fit the layout.
    """
    check_world(config, world)
    if text == "all":
        return list(range(world))
    if text == "corners":
        layout, replicas = config.layout, data_parallel_size(config, world)
        inner = layout.tensor * layout.context
        stage = inner * replicas
        places = product(range(layout.pipeline), {0, replicas - 1}, range(inner))
        return sorted(p * stage + d * inner + i for p, d, i in places)
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) < world for word in words):
        raise ConfigError(
            f"--ranks={text} does not name ranks of --world={world}; use all, corners, or numbers "
            f"from 0 to {world - 1} with commas"
        )
    return sorted({int(word) for word in words})


def _rehearse_rank(config: RunConfig, rank: int, world: int) -> RankRecord:
    """Runs in a process that may be fresh."""
    from xlstm_mcore.megatron.first_import import import_megatron

    import_megatron()
    from pretrain.rehearsal.rank import rehearse_rank

    return rehearse_rank(config, rank, world)
