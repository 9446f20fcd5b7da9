"""From the start of a job to its first step: what is measured here, counted, and assumed.

    python -m benchmarks.large_runs.first_step [RUN_FILE] --world 64 --shards 20000 --megabytes 256

A rank of the run is rehearsed, which counts its tensors, groups and messages. Rates are CPU time of
this machine, one core for a rank. What depends on GPUs, the network or the file system is assumed,
and the constants below say so.
"""

import argparse
import datetime
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.config import RunConfig, load_config
from pretrain.processes.workers import free_port
from xlstm_mcore.megatron.first_import import import_megatron, no_collections

GOAL = 60.0
RUN_FILE = Path(__file__).parents[2] / "pretrain" / "configs" / "xlstm_7b.yaml"

# Assumed, and measured nowhere.
RANK_GBS = 1.0  # what the file system gives each rank while all of them read
COMMUNICATOR_S = 1.0  # NCCL, to connect the ranks of a group at its first message
KERNELS_S = 20.0  # compiling and checking kernels: the goal of guard.kernel_check on a new GPU
MFU = 0.4  # share of the GPUs' rate in the first step
PEAK_TFLOPS = 989.4  # of an H100 in bf16
# Requests to the store of rank 0: `meet` registers, decides and reads, and looks again ten times a
# second while ranks come, here for two seconds; each new group is a barrier in the store.
MEETING_REQUESTS = 5 + 20
GROUP_REQUESTS = 3


@dataclass(frozen=True)
class Part:
    """One part of a start.

    Attributes:
        name: what happens.
        seconds: how long it takes a rank.
        basis: measured, counted or assumed: what the least sure factor of it is.
        how: the factors.
        only: the start that it belongs to, the run's "first" or a "later" one; None for both.
    """

    name: str
    seconds: float
    basis: str
    how: str
    only: str | None = None


@dataclass(frozen=True)
class Rates:
    """CPU seconds of this machine, of one core.

    Attributes:
        imports: of a rank, with the start of Python.
        first_batch: from a folder of shards to the first batch.
        request: one request to a store, both sides of it.
        draw: one initial value.
        read: one byte of a checkpoint from the page cache, with its hash.
    """

    imports: float
    first_batch: float
    request: float
    draw: float
    read: float


def parts(config: RunConfig, world: int, rates: Rates) -> list[Part]:
    """What a start of the run consists of.

    Args:
        config: the run.
        world: its number of ranks.
        rates: of this machine.
    """
    from pretrain.config.support import zero_stage
    from pretrain.rehearsal.rank import rehearse_rank
    from xlstm_mcore.sizes.flops import training_flops
    from xlstm_mcore.sizes.parameters import count_parameters

    record = rehearse_rank(config, 0, world, steps_only=True)
    groups = sum(message.operation == "new_group" for message in record.messages)
    used = {
        message.group
        for message in record.messages
        if len(message.members) > 1 and message.operation != "new_group"
    }
    requests = world * (MEETING_REQUESTS + GROUP_REQUESTS * groups)
    parameters = count_parameters(config.model)["total"]
    # Every replica has all weights below ZeRO 3, reads its share and sends it to the others.
    shares = (
        1 if zero_stage(config) == 3 else world // (config.layout.tensor * config.layout.pipeline)
    )
    held = record.memory.held
    own = held.get("weights", 0) / shares + held.get("optimizer state", 0)
    ramp = config.data.batch_ramp
    rows = ramp[0].global_batch if ramp else config.data.global_batch
    work = rows * config.data.seq_len * training_flops(config.model, config.data.seq_len)
    read, hashed = own / 1e9 / RANK_GBS, own * rates.read
    return [
        Part("imports", rates.imports, "measured", "a fresh Python, files in the page cache"),
        Part(
            "rendezvous and process groups",
            requests * rates.request,
            "counted",
            f"{requests:,} requests of {world} ranks for {groups} groups, one after the other",
        ),
        Part("plan and first batch", rates.first_batch, "measured", "all shards opened and read"),
        Part(
            "initial values",
            parameters * rates.draw,
            "counted",
            f"{parameters:,} draws: each rank draws the whole of its tensors",
            only="first",
        ),
        Part(
            "checkpoint",
            max(read, hashed),
            "assumed",
            f"{own / 1e9:.1f} GB for a rank: {read:.1f} s at {RANK_GBS:g} GB/s, "
            f"{hashed:.1f} s of CPU for their hashes",
            only="later",
        ),
        Part("kernels", KERNELS_S, "assumed", "compiled and checked, then cached", only="first"),
        Part(
            "NCCL",
            COMMUNICATOR_S * len(used),
            "assumed",
            f"{len(used)} groups that talk until the first step is over",
        ),
        Part(
            "first step",
            work / world / PEAK_TFLOPS / 1e12 / MFU,
            "assumed",
            f"{rows} rows at {MFU:.0%} of the GPUs' rate",
        ),
    ]


def total(found: Sequence[Part], start: str) -> float:
    """Seconds of a run's "first" start or of a "later" one."""
    return sum(part.seconds for part in found if part.only in (None, start))


def text(found: Sequence[Part]) -> str:
    """The table, with the sum for both kinds of starts."""
    lines = [" seconds"]
    for part in found:
        when = f" ({part.only} start)" if part.only else ""
        lines.append(f"{part.seconds:8.2f}  {part.basis:9} {part.name + when:30} {part.how}")
    for start in ("first", "later"):
        seconds = total(found, start)
        verdict = "reached" if seconds <= GOAL else "not reached"
        lines.append(f"{seconds:8.2f}  in all at a {start} start; goal {GOAL:.0f} s: {verdict}")
    return "\n".join(lines)


def measure(imports: float, shards: int, megabytes: int) -> Rates:
    """The rates of this machine.

    Args:
        imports: CPU seconds that this process has spent on the imports of a rank.
        shards: of the corpus.
        megabytes: of the checkpoint that is read.
    """
    import torch

    from benchmarks.checkpoint import make_state
    from benchmarks.loader import start as loader_start
    from pretrain.checkpoint import TensorSlice, load_checkpoint, save_checkpoint

    port, draws, requests = free_port(), torch.empty(1 << 22), 1000
    limit = datetime.timedelta(seconds=60)
    store = torch.distributed.TCPStore("127.0.0.1", port, 1, True, limit)
    state = make_state(megabytes)
    slices = [TensorSlice(n, tuple(t.shape), (0,) * t.ndim, t) for n, t in state.items()]
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        loader_start.many_shards(corpus, shards)
        path = save_checkpoint(Path(folder) / "checkpoints", slices, {}, {}, step=1)
        return Rates(
            imports,
            loader_start.measure(corpus).whole / 1e3,
            _cpu_seconds(lambda: [store.add("asked", 1) for _ in range(requests)]) / requests,
            _cpu_seconds(lambda: draws.normal_()) / draws.numel(),
            _cpu_seconds(lambda: load_checkpoint(path, slices)) / (megabytes * 1e6),
        )


def _cpu_seconds(work: Callable[[], object]) -> float:
    """Of the faster of two runs."""
    times = []
    for _ in range(2):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def main(words: Sequence[str] | None = None) -> None:
    """Print a line for each part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run_file", nargs="?", type=Path, default=RUN_FILE)
    parser.add_argument("--world", type=int, default=64)
    parser.add_argument("--shards", type=int, default=20_000)
    parser.add_argument("--megabytes", type=int, default=256)
    options = parser.parse_args(words)
    with no_collections():
        import_megatron()
        import pretrain.commands.run.train  # noqa: F401 (what a rank imports)
    rates = measure(time.process_time(), options.shards, options.megabytes)
    print(text(parts(load_config(options.run_file, quiet=True), options.world, rates)))


if __name__ == "__main__":
    main()
