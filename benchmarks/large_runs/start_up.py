"""CPU seconds that a rank spends on imports before it trains.

    python -m benchmarks.large_runs.start_up [--times 3]

Each row is a fresh Python, and the fastest of some times counts, with the files in the page cache.
The rows take turns, so that a busy machine is busy for all of them.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
GOAL = 2.5
RANK = "a rank, as pretrain imports it"
ROWS = {
    "Python alone": "pass",
    "torch": "import torch",
    "megatron-core, as it imports itself": (
        "import megatron.core, megatron.core.optimizer, megatron.core.pipeline_parallel, "
        "megatron.core.transformer.attention"
    ),
    RANK: (
        "from xlstm_mcore.megatron.first_import import import_megatron, no_collections\n"
        "with no_collections(): import_megatron(); "
        "import pretrain.commands.run.train, pretrain.engines.megatron"
    ),
}
# Python's end frees what was imported, which is not part of a start.
_COUNT = "; import sys, time; print(time.process_time(), len(sys.modules))"


def measure(code: str) -> tuple[float, int]:
    """CPU seconds of a fresh Python until some code has run, and the modules it has then."""
    words = [sys.executable, "-W", "ignore", "-c", code + _COUNT]
    done = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
    seconds, modules = done.stdout.split()
    return float(seconds), int(modules)


def measure_all(rows: dict[str, str], times: int) -> dict[str, tuple[float, int]]:
    """What `measure` says of each row at its best of some times.

    Args:
        rows: code by name.
        times: how often each runs.
    """
    found: dict[str, tuple[float, int]] = {}
    for _ in range(times):
        for name, code in rows.items():
            one = measure(code)
            found[name] = min(found.get(name, one), one)
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Print a line for each row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--times", type=int, default=3)
    times = parser.parse_args(words).times
    found = measure_all(ROWS, times)
    print(f"{'CPU seconds':>11}{'modules':>9}")
    for name, (seconds, modules) in found.items():
        print(f"{seconds:11.2f}{modules:9}  {name}")
    seconds, _ = found[RANK]
    print(f"goal: {GOAL} s for a rank: {'reached' if seconds <= GOAL else 'not reached'}")


if __name__ == "__main__":
    main()
