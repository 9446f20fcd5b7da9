"""The loader on one core: tokens/s as tensors beside Megatron-core's GPTDataset, resume, memory.

    python -m benchmarks.loader [--rounds 5] [--seq-len 2048] [--rows 12288]

Both read the same random tokens from the page cache, in one process, in turns; speeds are tokens
per second of CPU time (all threads), the median over rounds. Ours gives batches of tokens, labels,
loss mask and document boundaries from a mixture of two sources; GPTDataset's items are tokens,
labels, loss mask and position ids, one row at a time, not yet collated, its attention mask off.
"""

import argparse
import gc
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from benchmarks.loader.synthetic_shards import write_shards

MICRO_BATCH, STEP_ROWS = 8, 64
MEMORY_PROBE = """
import sys
import torch
def rss():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024
torch.ones(8, dtype=torch.int64).to(torch.float32)
before = rss()
from benchmarks.loader.__main__ import make_plan, read
plan = make_plan(sys.argv[1], int(sys.argv[2]), sys.argv[3])
imported = rss()
read(plan, int(sys.argv[4]))
print(rss() - before, imported - before)
"""


def make_plan(root: str | Path, seq_len: int, shuffle: str = "row", window: int = 4):
    """Two sources of one folder, 7 to 3."""
    from pretrain.data import DataPlan, Phase, TokenDataset

    sources = {name: TokenDataset(root, seq_len=seq_len, source=name) for name in ("web", "code")}
    phases = [Phase(0, {"web": 0.7, "code": 0.3})]
    return DataPlan(sources, phases, seed=1, shuffle=shuffle, window_shards=window)


def read(plan, rows: int, consumed: int = 0, workers: int = 0) -> float:
    """CPU seconds of this process for `rows` rows as batches."""
    from pretrain.config.ramp import BatchRamp
    from pretrain.data import TrainLoader

    start = time.process_time()
    options = dict(micro_batch=MICRO_BATCH, consumed_samples=consumed, workers=workers)
    with TrainLoader(plan, BatchRamp(STEP_ROWS), **options) as loader:
        for _ in range(rows // STEP_ROWS):
            next(loader)
    return time.process_time() - start


def megatron_dataset(root: Path, seq_len: int, rows: int):
    """The same number of tokens as an indexed dataset behind GPTDataset."""
    warnings.filterwarnings("ignore")
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = 1000, 2, 0, {"class": "none"}

    prefix = str(root / "megatron")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    rng = np.random.default_rng(0)
    left = rows * seq_len + 1
    while left > 0:
        size = min(left, int(rng.integers(2, 1000)))
        builder.add_document(rng.integers(3, 1000, size).astype(np.uint16), [size])
        left -= size
    builder.finalize(f"{prefix}.idx")
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_len,
        split="1",
        path_to_cache=str(root / "cache"),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(prefix, multimodal=False, mmap=True)
    documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
    return GPTDataset(indexed, prefix, documents, rows, Split.train, config)


def megatron_seconds(dataset, rows: int) -> float:
    """CPU seconds for `rows` items, in the dataset's shuffled order."""
    start = time.process_time()
    for number in range(rows):
        dataset[number % len(dataset)]
    return time.process_time() - start


def opened_files(plan, rows: int) -> tuple[int, int]:
    """(.tar files opened in all, most open at once) while `rows` rows are read in order."""
    opened, most = [], 0

    def hook(event, arguments):
        if event == "open" and str(arguments[0]).endswith(".tar"):
            opened.append(arguments[0])

    sys.addaudithook(hook)
    for number in range(rows // STEP_ROWS):
        samples = np.arange(number * STEP_ROWS, (number + 1) * STEP_ROWS)
        plan.read(*plan.locate(samples))
        most = max(most, sum(dataset.open_files for dataset in plan.datasets))
    return len(opened), most


def worker_seconds(plan, rows: int, workers: int) -> float:
    """CPU seconds of this process and its worker processes together."""

    def children() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = children()
    own = read(plan, rows, workers=workers)
    return own + children() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=12288)
    parser.add_argument("--quick", action="store_true", help="no peer, no memory")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    rows, seq_len = options.rows, options.seq_len
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shard = rows // 8
        write_shards(root, {"web": [shard] * 5, "code": [shard] * 3}, seq_len=seq_len)
        plan = make_plan(root, seq_len)
        print(f"{rows} rows of {seq_len}, 8 shards, micro-batches of {MICRO_BATCH}")
        first = read(plan, rows)
        peer = None if options.quick else megatron_dataset(root, seq_len, rows)
        if peer is not None:
            megatron_seconds(peer, rows)
        ours, theirs = [], []
        for _ in range(options.rounds):
            ours.append(read(plan, rows))
            if peer is not None:
                theirs.append(megatron_seconds(peer, rows))
        million = rows * seq_len / 1e6
        speed = million / statistics.median(ours)
        print(f"this loader, every block hashed for the first time  {million / first:7.1f} Mtok/s")
        print(f"this loader                                         {speed:7.1f} Mtok/s")
        if peer is not None:
            speed = million / statistics.median(theirs)
            ratio = statistics.median(t / o for t, o in zip(theirs, ours, strict=True))
            print(f"GPTDataset items                                    {speed:7.1f} Mtok/s")
            print(f"ratio, median of {options.rounds} rounds: {ratio:.1f}")
        speed = million / statistics.median(
            worker_seconds(plan, rows, 2) for _ in range(options.rounds)
        )
        print(f"with 2 worker processes, theirs and ours together   {speed:7.1f} Mtok/s")
        print("CPU ms from a loader to its first batch, by sample number:")
        # Python's full collection walks all that torch and the peer have imported, 0.2 s, and would
        # fall into the same one of these numbers every time.
        gc.freeze()
        for shuffle in ("row", "window"):
            found = []
            for sample in (0, 10**6, 10**9, 10**13):
                start = time.process_time()
                fresh = make_plan(root, seq_len, shuffle)
                opened = time.process_time() - start
                found.append(f"{float(sample):.0e}: {1e3 * read(fresh, STEP_ROWS, sample):.1f}")
            print(f"  {shuffle:6}  {', '.join(found)}; opening the folder {1e3 * opened:.1f}")
        for shuffle in ("row", "window"):
            total, most = opened_files(make_plan(root, seq_len, shuffle, 1), rows)
            print(
                f"files: {shuffle}, about one pass over 8: {total} opened, at most {most} at once"
            )
        if options.quick:
            return
        arguments = [str(root), str(seq_len), "row", str(rows)]
        probe = subprocess.run(
            [sys.executable, "-c", MEMORY_PROBE, *arguments],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        all_, imports = map(float, probe.stdout.split())
        print(f"memory over a process with torch: {all_:.0f} MB, {imports:.0f} of it our imports")


if __name__ == "__main__":
    main()
