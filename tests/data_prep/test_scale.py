"""Memory and work of a build do not grow with the corpus.

The plan is tried here at a small size. A whole build takes minutes, so it runs when it is asked
for: `XLSTM_WIDE=1 make test TESTS=tests/data_prep/test_scale.py`.
"""

import json
import os
import random
import subprocess
import sys

import pytest

from benchmarks.data_prep.plan_scale import measure

#: Most memory of a build with one worker, whose largest document has 16 MiB.
MOST_BYTES = 2_500_000_000
CORPORA = (("small", 20, 1000), ("more", 80, 1000), ("long", 20, 15 << 20))
BUILD = """
import resource, sys
from data_prep.cli import main
code = main(sys.argv[1:])
print("peak", int(code), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_a_plan_over_many_files_drops_what_repeats(tmp_path, monkeypatch):
    """Spread over buckets on disk and not: the same documents."""
    found = []
    for rows in (1 << 20, 100):
        monkeypatch.setattr("data_prep.build.repeated.BUCKET_ROWS", rows)
        monkeypatch.setattr("data_prep.build.repeated._HELD_ROWS", rows + 250)  # of some files
        folder = tmp_path / str(rows)
        folder.mkdir()
        found.append(measure(4000, 40, folder))
    assert found[0]["dropped"] == found[1]["dropped"] > 0


def _corpus(path, megabytes: int, largest: int) -> None:
    rng = random.Random(megabytes)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(20_000)]
    with open(path, "w") as file:
        for _ in range(megabytes * 250):
            file.write(json.dumps({"text": " ".join(rng.choices(words, k=600))}) + "\n")
        file.write(json.dumps({"text": " ".join(rng.choices(words, k=largest // 7))}) + "\n")


@pytest.mark.skipif(not os.environ.get("XLSTM_WIDE"), reason="XLSTM_WIDE=1 asks for it")
def test_the_memory_of_a_build_is_bounded_by_its_largest_document(tmp_path, tokenizer_dir):
    peaks = {}
    for name, megabytes, largest in CORPORA:
        _corpus(tmp_path / f"{name}.jsonl", megabytes, largest)
        words = ["build", "--input", tmp_path / f"{name}.jsonl", "--tokenizer", tokenizer_dir]
        words += ["--out", tmp_path / name, "--workers", 1, "--valid-fraction", 0.01]
        done = subprocess.run(
            [sys.executable, "-c", BUILD, *map(str, words)], capture_output=True, text=True
        )
        code, peak = done.stdout.split("peak")[-1].split()
        assert code == "0", done.stderr
        peaks[name] = int(peak)
    print(peaks)
    assert peaks["more"] < 1.2 * peaks["small"]
    assert peaks["long"] < MOST_BYTES
