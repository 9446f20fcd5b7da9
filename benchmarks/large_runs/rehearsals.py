"""Every run file for GPUs, rehearsed at its size: messages, memory, waits of the host.

    python -m benchmarks.large_runs.rehearsals [FILE ...] --world 64 --gpu h100 --ranks corners

Without files, all of pretrain/configs but the CPU demos. One line per file; exit code 3 when ranks
of one of them do not agree or do not fit.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.commands.before_run.rehearse import chosen_ranks, rehearse
from pretrain.config import load_config
from pretrain.rehearsal.compare import unexpected_waits
from pretrain.rehearsal.gpus import RESERVE, gpu_named
from pretrain.rehearsal.record import STEADY
from xlstm_io.errors import ExitCode

CONFIGS = Path(__file__).parents[2] / "pretrain" / "configs"


def main(argv: Sequence[str] | None = None) -> int:
    """Rehearse the files and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--world", type=int, default=64)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--ranks", default="corners")
    options = parser.parse_args(argv)
    gpu = gpu_named(options.gpu)
    files = options.files or [f for f in sorted(CONFIGS.rglob("*.yaml")) if "cpu" not in f.name]
    failed = False
    print(f"{'run file':28}{'ranks':>7}{'peak GB':>9}{'free GB':>9}{'mismatches':>12}{'waits':>7}")
    for path in files:
        config = load_config(path, quiet=True)
        ranks = chosen_ranks(config, options.world, options.ranks)
        done = rehearse(config, options.world, ranks, gpu)
        peak = max(record.memory.peak for record in done.records)
        waits = max(sum(n for _, n in unexpected_waits(r, STEADY)) for r in done.records)
        free = gpu.memory - RESERVE - peak
        print(
            f"{path.stem:28}{len(ranks):7}{peak / 1e9:9.1f}{free / 1e9:9.1f}"
            f"{len(done.mismatches):12}{waits:7}",
            flush=True,
        )
        failed |= bool(done.mismatches or done.too_large)
    return ExitCode.REFUTED if failed else ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
