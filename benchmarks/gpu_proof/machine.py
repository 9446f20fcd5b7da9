"""Part 0: what the machine is, and what it reaches in a large product and in a large copy."""

import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu_proof.setting import Setting
from benchmarks.kernels_gpu import time_ms

PACKAGES = ("torch", "triton", "megatron-core", "mlstm-kernels", "fla-core")


def rows(setting: Setting) -> Iterator[dict]:
    """Versions, then the two ceilings."""
    found = {"python": platform.python_version(), "host": platform.node()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if not setting.dry:
        found["device"] = torch.cuda.get_device_name()
        found["memory_gb"] = torch.cuda.get_device_properties(0).total_memory / 1e9
    found["ptxas"] = _last_line("ptxas", "--version")
    found["nvidia_smi"] = _last_line(
        "nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv"
    )
    yield {"name": "versions", **found}
    size = setting.pick(8192, 64)
    a, b = (torch.ones(size, size, dtype=torch.bfloat16, device=setting.device) for _ in "ab")
    ms = time_ms(lambda: a @ b, setting.device)["median"]
    yield {"name": f"product of {size}^3 bf16", "ms": ms, "tflops": 2 * size**3 / ms / 1e9}
    source = torch.empty(setting.pick(2**31, 2**16), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    ms = time_ms(lambda: target.copy_(source), setting.device)["median"]
    yield {"name": "copy", "ms": ms, "tb_per_s": 2 * source.nbytes / ms / 1e9}


def _last_line(command: str, *arguments: str) -> str | None:
    if shutil.which(command) is None:
        return None
    done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    return (done.stdout.strip().splitlines() or [None])[-1]
