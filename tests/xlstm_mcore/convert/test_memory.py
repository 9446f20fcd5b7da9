"""A folder in the layout and with the widths of xLSTM 7B, two layers: imported, exported, compared.

It takes 10 GB of disk and some minutes, so it runs when it is asked for:
`XLSTM_WIDE=1 make test TESTS=tests/xlstm_mcore/convert/test_memory.py`.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.import_memory import CONVERT, LIMIT, write_folder
from tests.xlstm_mcore.convert.small import train_tokenizer
from xlstm_io.tensor_files import open_tensors
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


@pytest.mark.skipif(not os.environ.get("XLSTM_WIDE"), reason="XLSTM_WIDE=1 asks for it")
def test_a_wide_model_comes_and_goes_in_two_gib(tmp_path):
    theirs, run, hf = (tmp_path / name for name in ("theirs", "run", "hf"))
    theirs.mkdir()
    write_folder(theirs, ModelConfig.model_validate(WIDE))
    # The import may take `LIMIT` bytes of address space beyond those of its start.
    words = ["-m", "benchmarks.import_memory", CONVERT, "from-hf", theirs, run]
    result = python(words)
    assert result.returncode == 0, result.stderr
    spm = train_tokenizer(tmp_path / "tokenizer.model")
    words = ["to-hf", run, hf, "--tokenizer", spm, "--keep-padding", "--shard-size", "1GB"]
    result = python(["-c", MEASURED, *words])
    assert result.returncode == 0, result.stderr
    code, peak = map(int, result.stdout.split()[-2:])
    report = json.loads((hf / "parity.json").read_text())
    print(f"peak {peak / 2**30:.2f} GiB", report)
    assert code == 0 and peak < LIMIT
    logits = [check for check in report["checks"] if check["name"].startswith("logits")]
    assert len(logits) == 4 and all(check["passed"] for check in logits)
    with open_tensors(theirs) as before, open_tensors(hf) as after:
        assert before.infos.keys() == after.infos.keys()
        for name in before.infos:
            assert torch.equal(before.read(name), after.read(name)), name


def python(words):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
