"""How long a save stops training, and how fast checkpoints are written and read.

`python -m benchmarks.checkpoint` saves and loads the same state with this project and with
torch.distributed.checkpoint (DCP) in turn, round after round, on one rank of this machine; medians
over rounds. The yardstick of the stall is the copy of the state into memory that is there already:
less is not possible without stopping the next step. Both flush to the disk; this project also
hashes every byte when it writes and when it reads.
"""

import argparse
import logging
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from pretrain.checkpoint import CheckpointSaver, TensorSlice, load_checkpoint, save_checkpoint

SHAPES = ((4096, 1024), (1024, 1024), (1024, 2736), (1024,))  # of one layer, more or less


def make_state(megabytes: int) -> dict[str, torch.Tensor]:
    """fp32 tensors of the given size in total."""
    state: dict[str, torch.Tensor] = {}
    left = megabytes * 1_000_000 // 4
    while left > 0:
        shape = SHAPES[len(state) % len(SHAPES)]
        if torch.Size(shape).numel() > left:
            shape = (left,)
        state[f"w{len(state)}"] = torch.randn(shape)
        left -= torch.Size(shape).numel()
    return state


def measure(megabytes: int, rounds: int, folder: Path) -> dict[str, float]:
    """Median seconds of each operation."""
    state = make_state(megabytes)
    slices = [TensorSlice(n, tuple(t.shape), (0,) * t.ndim, t) for n, t in state.items()]
    copies = {name: tensor.clone() for name, tensor in state.items()}
    saver = CheckpointSaver(folder / "background")
    times: dict[str, list[float]] = defaultdict(list)

    def timed(what: str, function: Callable[[], object]) -> object:
        started = time.perf_counter()
        value = function()
        times[what].append(time.perf_counter() - started)
        return value

    def copy() -> None:
        for name, tensor in state.items():
            copies[name].copy_(tensor)

    def ours_in_background() -> None:
        timed("stall", lambda: saver.save(slices, {}, {}, step=1))
        saver.wait()

    def dcp_in_background() -> None:
        future = timed("DCP stall", lambda: dcp.async_save(state, checkpoint_id=folder / "async"))
        future.result()

    for number in range(rounds + 1):
        if number == 1:
            times.clear()  # the first round allocates
        timed("copy", copy)
        timed("save in the background", ours_in_background)
        path = timed("save", lambda: save_checkpoint(folder / "ours", slices, {}, {}, step=1))
        timed("load", lambda path=path: load_checkpoint(path, slices))
        timed("DCP save in the background", dcp_in_background)
        timed("DCP save", lambda: dcp.save(state, checkpoint_id=folder / "dcp"))
        timed("DCP load", lambda: dcp.load(state, checkpoint_id=folder / "dcp"))
        for entry in folder.iterdir():
            shutil.rmtree(entry)
    assert all(torch.equal(copies[name], tensor) for name, tensor in state.items())
    return {what: statistics.median(values) for what, values in times.items()}


def report(seconds: dict[str, float], megabytes: int) -> str:
    """The table."""
    lines = [f"state of {megabytes} MB, one rank, medians; load is from the page cache"]
    for what in ("copy", "stall", "DCP stall"):
        ratio = seconds[what] / seconds["copy"]
        lines.append(f"{what:<28}{seconds[what] * 1e3:>9.1f} ms  {ratio:>6.2f} x the copy")
    for what in ("save in the background", "save", "load"):
        for name in (what, f"DCP {what}"):
            rate = megabytes / 1e3 / seconds[name]
            lines.append(f"{name:<28}{seconds[name] * 1e3:>9.1f} ms  {rate:>6.2f} GB/s")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: temporary)")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)  # DCP's about overwriting
    started_here = not dist.is_initialized()
    if started_here:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            seconds = measure(options.megabytes, options.rounds, Path(folder))
    finally:
        if started_here:
            dist.destroy_process_group()
    print(report(seconds, options.megabytes))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
