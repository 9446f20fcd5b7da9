"""What an error says when a device has no memory left: where it went, and what to change first.

In the first steps of a run that is the run file's mistake. Later it is not: the same work fitted
many times, so the memory was fragmented or somebody else's, and the same command may be repeated.
A run that goes on may have been given another layout; a start that gets nowhere is not repeated
without end (`slurm.job.decide`), so it is the machine's failure too.
"""

from pathlib import Path

import torch

from pretrain.config import RunConfig
from pretrain.planning.advice import ask, text
from pretrain.supervision.progress_file import read_progress
from xlstm_io.errors import ConfigError, MachineFailed, first_line
from xlstm_io.terminal import counted
from xlstm_mcore import hardware

FIRST_STEPS = 3  # of a life, in which every tensor of a step has been there once


def out_of_memory(
    error: BaseException,
    config: RunConfig,
    *,
    rank: int,
    processes: int,
    steps: int,
    before: int | None,
    folder: Path,
) -> ConfigError | MachineFailed | None:
    """An error as the end of the device's memory, or None if it is something else.

    Args:
        error: what ended this rank.
        config: the run.
        rank: of this process.
        processes: how many the run has.
        steps: that this life has done.
        before: steps that the run had done when this life began; None where the trainer was not
            built yet, so that `progress.json` is still that of the life before.
        folder: where a snapshot of the device's memory goes.

    Returns:
        A `ConfigError` in the first steps of a run, else a `MachineFailed`.
    """
    if not is_out_of_memory(error):
        return None
    if before is None:
        told = read_progress(Path(config.run.dir))
        before = 0 if told is None else told.step
    used, peak = hardware.memory_bytes(), hardware.peak_memory_bytes()
    limit = hardware.device_memory_bytes()
    snapshot = folder / f"memory-rank_{rank}.pickle"
    kept = hardware.save_memory_snapshot(snapshot)
    lines = [
        f"rank {rank} ran out of memory after {counted(steps, 'step')} of this start: "
        f"{first_line(error)}",
        f"it held {used / 1e9:.2f} GB then, and {peak / 1e9:.2f} GB at most, of "
        f"{limit / 1e9:.2f} GB",
    ]
    if kept:
        lines.append(f"{snapshot} shows every block of it; open it at pytorch.org/memory_viz")
    if steps >= FIRST_STEPS:
        lines.append(
            "earlier steps had room enough, so repeat the command; if it comes again, lower "
            "data.micro_batch or use a higher memory.recompute"
        )
        return MachineFailed("\n".join(lines))
    kind: type[ConfigError | MachineFailed] = ConfigError
    if before:
        kind = MachineFailed
        lines.append(
            f"the run has done {counted(before, 'step')} before: on the same layout they had room "
            "enough, so repeat the command; on another"
        )
    lines.append(text(ask(config, processes, limit), processes, limit))
    return kind("\n".join(lines))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation of tensors failed, on a GPU or in host memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
