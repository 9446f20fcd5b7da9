"""Training steps of the 7B-style sizes on GPUs: tokens/s per GPU and MFU beside the published ones.

    python -m benchmarks.train_step_gpu                            one GPU, every size
    torchrun --nproc-per-node 8 -m benchmarks.train_step_gpu --set engine.name=deepspeed \
        --set engine.zero_stage=2 --sizes 1.4B

A step is what the trainer runs in bf16: forward, backward, clipping and update on random tokens.
The run files are the ones in pretrain/configs. The 7B does not fit one GPU with its optimizer, so a
single process trains its widths with 4 of 32 blocks, of which head and optimizer are a larger part
than of the whole: neither its MFU nor its tokens/s compare, and benchmarks.gpu_proof tells blocks
and the rest apart. MFU is the model's FLOPs (sizes/flops.py, nothing for recomputation) over the
device's dense bf16 peak. Published: arXiv 2503.13427, table 2, 128 H100; the paper gives tokens/s,
and the MFU follows from the same count of FLOPs.

It has never run on a GPU.
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from pretrain import layout as layouts
from pretrain.config import RunConfig, config_from_dict
from pretrain.data import Batch
from pretrain.engines import make_engine
from pretrain.trainer import train_step
from xlstm_mcore import hardware
from xlstm_mcore.sizes.flops import peak_tflops, training_flops

CONFIGS = Path(__file__).parents[1] / "pretrain" / "configs"


@dataclass(frozen=True)
class Size:
    """A published size: its run file, rows per micro-batch, tokens/s per GPU, and MFU in percent.

    ``blocks`` is how many blocks one process trains, None for all.
    """

    file: str
    micro_batch: int
    tokens_per_second: float
    mfu: float
    blocks: int | None = None


SIZES = {
    "160M": Size("xlstm_large_165m.yaml", 4, 225_990, 17),
    "1.4B": Size("xlstm_large_1.3b.yaml", 1, 37_030, 30),
    "7B": Size("xlstm_7b.yaml", 1, 9_150, 37, blocks=4),
}


def run_config(size: Size, processes: int, settings: list[str]) -> RunConfig:
    """The size's run file, cut to what fits, with the user's ``key=value`` settings."""
    raw = yaml.safe_load((CONFIGS / size.file).read_text(encoding="utf-8"))
    if size.blocks is not None and processes == 1:
        raw["model"]["pattern"] = raw["model"]["pattern"][: size.blocks]
    raw["engine"], raw["layout"] = {"precision": "bf16"}, {}
    raw["data"] |= {"path": "unused", "micro_batch": size.micro_batch}
    raw["data"].pop("batch_ramp", None)
    for setting in settings:
        key, _, value = setting.partition("=")
        section, _, name = key.partition(".")
        raw.setdefault(section, {})[name] = yaml.safe_load(value)
    shape = raw.get("layout", {})
    replica = shape.get("tensor", 1) * shape.get("pipeline", 1) * shape.get("context", 1)
    raw["data"]["global_batch"] = raw["data"]["micro_batch"] * max(1, processes // replica) * 4
    return config_from_dict(raw)


def random_batches(config: RunConfig, layout: layouts.Layout) -> list[Batch]:
    """This replica's micro-batches of one step, of random tokens, a document for each row."""
    data, batches = config.data, []
    rng = torch.Generator().manual_seed(layout.dp_rank)
    for _ in range(data.global_batch // (data.micro_batch * layout.dp_size)):
        shape = (data.micro_batch, data.seq_len + 1)
        tokens = torch.randint(0, config.model.vocab_size, shape, generator=rng)
        ones = torch.ones(data.micro_batch, data.seq_len)
        starts, sources = torch.zeros_like(ones).bool(), ones[:, :0].double()
        batches.append(Batch(tokens[:, :-1], tokens[:, 1:], ones, starts, sources))
    return batches


def measure(config: RunConfig, steps: int) -> dict[str, Any]:
    """Median seconds of a step, tokens/s per process, and model TFLOP/s per process."""
    layout = layouts.start(config)
    engine, data = make_engine(config, layout), config.data
    batches = random_batches(config, layout)
    seconds = []
    for _ in range(steps + 2):  # two for compiling and for the allocator
        started = time.perf_counter()
        # The result is of numbers, so the device has caught up.
        result = train_step(engine, batches, config.optimizer.lr * 1e-3)
        seconds.append(time.perf_counter() - started)
    assert result.accepted, result
    median = statistics.median(seconds[2:])
    engine.close()  # or its memory would stay for as long as the process lives
    rate = config.tokens_per_step / median / layout.world_size
    return {
        "seconds": median,
        "tokens_per_second": rate,
        "tflops": rate * training_flops(config.model, data.seq_len) / 1e12,
        "memory": hardware.peak_memory_bytes(),
        "main": layout.is_main,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 0 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    chosen = parser.parse_args(arguments)
    if hardware.without_cuda():
        print("no GPU here: torch.cuda.is_available() is False. Nothing was timed.")
        return 0
    peak = peak_tflops(torch.cuda.get_device_name())
    for name in chosen.sizes:
        size = SIZES[name]
        config = run_config(size, int(os.environ.get("WORLD_SIZE", "1")), chosen.set)
        try:
            got = measure(config, chosen.steps)
        finally:
            layouts.leave()
        if not got["main"]:
            continue
        mfu = "?" if peak is None else f"{100 * got['tflops'] / peak:.1f} %"
        blocks = len(config.model.pattern.replace("|", ""))
        print(
            f"{name:5} {blocks:3} blocks  {got['tokens_per_second']:>10,.0f} tokens/s per GPU, "
            f"MFU {mfu}, {got['memory'] / 2**30:.1f} GiB; published "
            f"{size.tokens_per_second:,.0f} tokens/s, {size.mfu} %"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
