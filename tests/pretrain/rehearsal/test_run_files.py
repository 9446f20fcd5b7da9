"""The rehearsal of shipped run files; `benchmarks.large_runs.rehearsals` takes all of them."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_smallest_run_file_passes_at_64_ranks(warm_python):
    done = subprocess.run(
        [
            warm_python.executable,
            *("-m", "benchmarks.large_runs.rehearsals", "pretrain/configs/xlstm_large_164m.yaml"),
        ],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    name, ranks, _, free, mismatches, waits = done.stdout.splitlines()[1].split()
    assert (name, ranks, mismatches, waits) == ("xlstm_large_164m", "2", "0", "0")
    assert float(free) > 0
