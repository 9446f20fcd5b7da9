"""Plan of a build over made-up scans: seconds, bytes of disk and memory for each document.

    python -m benchmarks.data_prep.plan_scale --documents 100000000 --files 30000

Nothing is read or tokenized: scan rows with random hashes (one in fifty repeats another) are
written, and the plan is made of them: duplicates, splits, shards.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import xxhash

from data_prep.build.plan import plan_corpus
from data_prep.build.scan import SCAN_ROW, FileScan, InputFile
from data_prep.sources.documents import DEFAULT_FIELDS
from data_prep.sources.filters import TextFilters

_REPEATED = 50  # one document of so many repeats another
_MEAN_BYTES = 4000


def made_up_scans(folder: Path, documents: int, files: int, seed: int = 0) -> list[FileScan]:
    """Scans of `files` files with `documents` in all, stored in `folder`."""
    rng = np.random.default_rng(seed)
    bounds = np.linspace(0, documents, files + 1).astype(np.int64)
    scans = []
    for number, count in enumerate(np.diff(bounds).tolist()):
        rows = np.zeros(count, SCAN_ROW)
        rows["hash"] = rng.integers(0, 1 << 64, (count, 2), np.uint64, endpoint=False)
        repeats = np.flatnonzero(rng.integers(0, _REPEATED, count) == 0)
        rows["hash"][repeats] = rng.integers(0, 1000, (len(repeats), 1)).astype(np.uint64)
        rows["size"] = rng.exponential(_MEAN_BYTES, count).astype(np.int64) + 1
        rows["record"] = np.arange(count)
        path = folder / f"{number}.scan"
        rows.tofile(path)
        digest = xxhash.xxh3_128_hexdigest(rows["hash"].tobytes())
        scans.append(FileScan(str(path), count, 0, [], digest))
    return scans


def measure(documents: int, files: int, folder: Path) -> dict[str, float]:
    """Make a plan over made-up scans.

    Returns:
        seconds: CPU seconds of the plan.
        peak: most memory of this process so far, in bytes.
        disk: bytes of the scans and of the plan.
        dropped: documents that were left out.
        shards: planned shards.
    """
    scans = made_up_scans(folder, documents, files)
    inputs = [InputFile(f"/made/up/{n}.jsonl", "web", DEFAULT_FIELDS) for n in range(files)]
    start = time.process_time()
    plan = plan_corpus(
        inputs, scans, TextFilters(), 0.001, 64_000_000, folder / "_work", {"web": 1.0}
    )
    return {
        "seconds": time.process_time() - start,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "disk": sum(path.stat().st_size for path in folder.rglob("*")),
        "dropped": sum(plan.dropped["web"].values()),
        "shards": len(plan.shards),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line says, and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="where 50 bytes for each document fit")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(options.documents, options.files, Path(folder))
    print(
        f"{options.documents:,} documents in {options.files:,} files: {found['seconds']:.1f} CPU s "
        f"({1e6 * found['seconds'] / options.documents:.2f} us each), peak of "
        f"{found['peak'] / 1e6:.0f} MB, {found['disk'] / options.documents:.1f} bytes each on "
        f"disk, {found['dropped']:,} repeated, {found['shards']:,} shards"
    )


if __name__ == "__main__":
    main()
