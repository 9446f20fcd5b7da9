"""From a folder of many shards to the first batch: CPU milliseconds, and where they go.

    python -m benchmarks.loader.start --shards 20000

All shards are links to one small shard, so the folder is made in seconds. Sizes of all files are
compared as in a run; the blocks of the first batch are hashed.
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.loader.synthetic_shards import write_shards
from xlstm_io.foreign.json_file import read_json
from xlstm_io.foreign.untrusted import LIMITS
from xlstm_io.shards.manifest import (
    MANIFEST_NAME,
    load_manifest,
    split_fields,
    write_manifest,
)

SEQ_LEN, SHARD_ROWS, BATCH = 16, 8, 64


def many_shards(root: Path, shards: int) -> None:
    """A folder of `shards` training shards, all of the same bytes."""
    write_shards(root, {"web": [SHARD_ROWS]}, seq_len=SEQ_LEN, valid_rows=SHARD_ROWS)
    fields = read_json(root / MANIFEST_NAME, LIMITS.shard_manifest)
    split = fields["sources"][0]["splits"]["train"]
    (first,) = split["shards"]
    entries = []
    for number in range(shards):
        entry = dict(first)
        for key in ("path", "index"):
            entry[key] = first[key].replace("00000000", f"{number:08d}")
            if number:
                os.link(root / first[key], root / entry[key])
        entries.append(entry)
    split |= split_fields(entries)
    for key in ("version", "format", "hash", "checksum"):
        del fields[key]
    write_manifest(root, fields)


@dataclass(frozen=True)
class Start:
    """CPU milliseconds of the parts of a start.

    Attributes:
        manifest: reading and checking the manifest alone.
        dataset: opening the training split, which reads the manifest and compares all sizes.
        batch: from the dataset to the first batch.
        whole: from the folder to the first batch.
    """

    manifest: float
    dataset: float
    batch: float

    @property
    def whole(self) -> float:
        return self.dataset + self.batch


def measure(root: Path) -> Start:
    """One start in this process, which has its modules loaded."""
    from pretrain.config.ramp import BatchRamp
    from pretrain.data import DataPlan, TokenDataset, TrainLoader

    times = [time.process_time()]
    load_manifest(root)
    times.append(time.process_time())
    dataset = TokenDataset(root, "train", seq_len=SEQ_LEN)
    times.append(time.process_time())
    plan = DataPlan.of(dataset, seed=0)
    with TrainLoader(plan, BatchRamp(BATCH), micro_batch=8) as loader:
        next(loader)
    times.append(time.process_time())
    return Start(*(1e3 * (b - a) for a, b in pairwise(times)))


def main() -> None:
    """Measure what the command line says, and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        many_shards(Path(folder), options.shards)
        size = (Path(folder) / MANIFEST_NAME).stat().st_size
        starts = [measure(Path(folder)) for _ in range(options.rounds)]
    print(f"{options.shards:,} shards, a manifest of {size / 1e6:.1f} MB; CPU ms, median of rounds")
    for name, words in (
        ("manifest", "the manifest alone, read and checked"),
        ("dataset", "the manifest and the sizes of all shards"),
        ("whole", "the same and the first batch"),
    ):
        print(f"{words:42} {statistics.median(getattr(start, name) for start in starts):7.1f}")


if __name__ == "__main__":
    main()
