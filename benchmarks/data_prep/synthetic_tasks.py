"""Tokens per second of every generator of synthetic tasks, in one process.

Counted are the tokens of samples, in seconds of CPU time, at the lengths of training (of ListOps at
the Long Range Arena's). Writing them as shards comes on top; the last column has both.
"""

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path

import numpy as np

from data_prep.synthetic.command import TASKS
from data_prep.synthetic.corpus import write_corpora
from data_prep.synthetic.task import Span, Task
from xlstm_io.errors import PrepError
from xlstm_io.shards.manifest import load_manifest

_BATCH = 4096


def drawn_per_second(task: Task, seconds: float) -> float:
    """Tokens of samples per second of CPU time."""
    rng, span, tokens = np.random.default_rng(0), Span.parse(task.length, "--length"), 0
    began = time.process_time()
    while (spent := time.process_time() - began) < seconds:
        tokens += int(task.draw(rng, _BATCH, span).lengths.sum())
    return tokens / spent


def written_per_second(name: str, task: Task) -> float:
    """The same, with the split of samples, packing, hashes and shards."""
    began = time.process_time()
    write_corpora(name, task)
    spent = time.process_time() - began
    splits = load_manifest(task.out / "train").sources[0].splits.values()
    return sum(split.tokens for split in splits) / spent


def main(argv: list[str] | None = None) -> None:
    """Print a line for each task."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU time of each measurement")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="about so many are written")
    options = parser.parse_args(argv)
    print(f"{'task':20s} {'M tokens/s drawn':>17s} {'M tokens/s written':>19s}")
    for name, kind in TASKS.items():
        with tempfile.TemporaryDirectory() as folder:
            task = kind(out=Path(folder))
            low, high = Span.parse(task.length, "--length")
            task.samples = max(20, 2 * options.tokens // (low + high))
            task.validation_samples = max(1, task.samples // 50)
            try:
                drawn = drawn_per_second(task, options.seconds)
            except PrepError as error:  # images that are not installed
                print(f"{name:20s} {error}")
                continue
            with contextlib.redirect_stdout(io.StringIO()):  # what the command says
                written = written_per_second(name, task)
        print(f"{name:20s} {drawn / 1e6:17.1f} {written / 1e6:19.1f}")


if __name__ == "__main__":
    main()
