"""Part 3: real training steps at the 7B's widths, by which a block and the rest are told apart.

With 2 and with 6 blocks the difference is 4 blocks, whatever head, loss and optimizer take. The
optimizer holds all of a block's state on one GPU here; a run of many shares it out.
"""

import gc
from collections.abc import Iterator

import torch

from benchmarks import train_step_gpu
from benchmarks.gpu_proof.setting import Setting
from pretrain import layout as layouts
from pretrain.config import RunConfig
from xlstm_mcore.sizes.flops import peak_tflops, training_flops

BLOCKS = (2, 6)
TINY = ["model.hidden_size=64", "model.num_heads=2", "model.vocab_size=128", "data.seq_len=32"]
TINY += ["engine.precision=fp32"]


def config_of(setting: Setting, blocks: int, recompute: str) -> RunConfig:
    """The 7B's run file with some blocks, two micro-batches a step."""
    words = [f"model.pattern={'M' * blocks}", f"memory.recompute={recompute}"]
    words += ["memory.cell_states=bf16", *(TINY if setting.dry else [])]
    return train_step_gpu.run_config(train_step_gpu.SIZES["7B"], 1, words)


def rows(setting: Setting) -> Iterator[dict]:
    """A row for each mode and number of blocks, and after each mode the sum of 32 blocks."""
    for recompute in ("selective", "none", "full"):
        found = {}
        for blocks in BLOCKS:
            row = _measured(setting, config_of(setting, blocks, recompute))
            found[blocks] = row
            yield {"name": f"{recompute}, {blocks} blocks", **row}
        if any("left_out" in row for row in found.values()):
            continue
        config = config_of(setting, BLOCKS[0], recompute)
        micro_batches = config.data.global_batch // config.data.micro_batch
        few, many = (1e3 * found[blocks]["seconds"] for blocks in BLOCKS)
        block = (many - few) / (BLOCKS[1] - BLOCKS[0]) / micro_batches
        rest = few / micro_batches - BLOCKS[0] * block
        whole = config_of(setting, 32, recompute).model
        ms = 32 * block + rest
        tokens = config.data.micro_batch * config.data.seq_len
        summary = {"ms_per_block": block, "ms_rest": rest, "ms_32_blocks": ms}
        summary["tokens_per_s"] = 1e3 * tokens / ms
        peak = None if setting.dry else peak_tflops(torch.cuda.get_device_name())
        if peak is not None:
            flops = training_flops(whole, config.data.seq_len) * tokens
            summary["mfu"] = flops / (ms / 1e3) / (peak * 1e12)
        yield {"name": f"{recompute}, 32 blocks by difference", **summary}


def _measured(setting: Setting, config: RunConfig) -> dict:
    """One measurement, and the card empty again afterwards."""
    if not setting.dry:
        torch.cuda.reset_peak_memory_stats()
    try:
        row = train_step_gpu.measure(config, setting.pick(6, 1))
        if not setting.dry:
            row["reserved"] = torch.cuda.max_memory_reserved()
        return row
    except torch.OutOfMemoryError as error:
        return {"left_out": f"out of memory: {str(error)[:200]}"}
    finally:
        layouts.leave()
        gc.collect()
        if not setting.dry:
            torch.cuda.empty_cache()
