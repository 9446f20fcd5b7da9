"""Part 7: compute-sanitizer's memory check over a small call of each kernel, where it is."""

import shutil
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.gpu_proof.setting import Setting

CODE = """
import torch
from benchmarks.gpu_proof.correctness import cases, differentiate
from benchmarks.gpu_proof.setting import Setting

class Small(Setting):
    device, backend = "cuda", "triton"

from pathlib import Path
for name, dtype, function, inputs in cases(Small(Path("."), True)):
    differentiate(function, "triton", inputs)
torch.cuda.synchronize()
"""


def rows(setting: Setting) -> Iterator[dict]:
    """The checker's verdict."""
    tool = shutil.which("compute-sanitizer")
    if setting.dry or tool is None:
        reason = "it checks GPUs" if setting.dry else "compute-sanitizer is not here"
        yield {"name": "memcheck", "left_out": reason}
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip().splitlines()
    yield {"name": "memcheck", "ok": done.returncode == 0, "said": said[-8:]}
