"""Export of a model at the widths of xLSTM 7B, two layers: memory, and the comparison.

It takes 7 GB of disk and some minutes, so it runs when it is asked for:
`XLSTM_WIDE=1 make test TESTS=tests/xlstm_mcore/convert/test_memory.py`.
"""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch

from pretrain.checkpoint import TensorSlice, save_checkpoint
from tests.xlstm_mcore.convert.small import train_tokenizer
from xlstm_mcore.convert.families import FAMILIES
from xlstm_mcore.convert.tables import rows
from xlstm_mcore.settings import ModelConfig

WIDE = {"pattern": "MM", "hidden_size": 4096, "num_heads": 8, "vocab_size": 50304}
#: Runs a conversion, and prints its exit code and the most anonymous memory it had, in bytes.
MEASURED = """
import sys, threading, time
from xlstm_mcore.convert import cli

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.01):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
code = cli.main(sys.argv[1:])
done.set()
thread.join()
print(code.value, peak)
"""


def overlapping(shape, seed):
    """A tensor of random values that takes the memory of a few of its rows."""
    rng = torch.Generator().manual_seed(seed)
    last = shape[-1]
    first = shape[0] if len(shape) == 2 else 1
    values = torch.randn(13 * first + last, generator=rng) / 64
    return values.as_strided(shape, (13, 1) if len(shape) == 2 else (1,))


@pytest.mark.skipif(not os.environ.get("XLSTM_WIDE"), reason="XLSTM_WIDE=1 asks for it")
def test_a_wide_model_takes_less_than_two_gib(tmp_path):
    spm = train_tokenizer(tmp_path / "tokenizer.model")
    model = ModelConfig.model_validate(WIDE)
    slices = []
    for seed, row in enumerate(rows(FAMILIES["xlstm"].TABLE, model)):
        tensor = overlapping(row.shape, seed)
        if row.ours[0].endswith("norm.weight"):
            tensor = torch.ones(row.shape)
        slices.append(TensorSlice(row.ours[0], row.shape, (0,) * len(row.shape), tensor))
    digest = hashlib.sha256(spm.read_bytes()).hexdigest()
    state = {"tokens": 1, "tokenizer": {"path": str(spm), "sha256": digest}}
    checkpoint = save_checkpoint(tmp_path / "run", slices, state, {"model": WIDE}, step=1)
    words = ["to-hf", checkpoint, tmp_path / "hf", "--keep-padding", "--shard-size", "1GB"]
    result = subprocess.run(
        list(map(str, [sys.executable, "-c", MEASURED, *words])), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    code, peak = map(int, result.stdout.split()[-2:])
    report = json.loads((tmp_path / "hf" / "parity.json").read_text())
    print(f"peak {peak / 2**30:.2f} GiB", report)
    assert code == 0 and peak < 2 * 2**30
    logits = [check for check in report["checks"] if check["name"].startswith("logits")]
    assert len(logits) == 4 and all(check["passed"] for check in logits)
