"""The archive for a machine without a network has what it should, and Triton finds its kernels."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks.gpu_proof.pack import ENVIRONMENT, LIMIT

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]

# A launch as on the machine, up to the place where the GPU would be needed: is it compiled anew?
LAUNCH = """
import torch, triton
from triton import knobs
from triton.backends.compiler import GPUTarget

class Device:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

triton.runtime.driver.set_active(Device())
hits = []
knobs.compilation.listener = lambda *, cache_hit, **rest: hits.append(cache_hit)
from xlstm_kernels.gated.triton import plan_forward
both, out = (torch.empty(8192, n * 10944, dtype=torch.bfloat16, device="meta") for n in (2, 1))
launch = plan_forward(both, out, gelu=False)
launch.kernel.warmup(
    **launch.arguments, grid=launch.grid, num_warps=launch.num_warps, num_stages=launch.num_stages
)
assert hits == [True], hits
"""


def test_a_dry_run_packs_source_and_kernels_that_are_found(warm_python, tmp_path):
    out = tmp_path / "pack"
    done = subprocess.run(
        [warm_python.executable, "-m", "benchmarks.gpu_proof.pack", "--out", out, "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    archive = tmp_path / "pack.tar.xz"
    assert f"at most {LIMIT >> 20}" in done.stdout and archive.stat().st_size < LIMIT
    about = json.loads((out / "about.json").read_text())
    assert "megatron-core" in about["packages"] and "torch" not in about["packages"]
    with tarfile.open(archive) as file:
        names = set(file.getnames())
    assert {"pack/run.sh", "pack/about.json", "pack/source/pretrain/__main__.py"} <= names
    assert any(name.startswith("pack/triton-cache/") and ".cubin" in name for name in names)
    subprocess.run(["sh", "-n", out / "run.sh"], check=True)
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"}
    environment |= {"TRITON_CACHE_DIR": str(out / "triton-cache"), "HOME": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", LAUNCH],
        env=environment | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr


def test_every_kernel_of_the_proof_is_packed_as_it_is_launched(warm_python):
    done = subprocess.run(
        [warm_python.executable, "-m", "tests.kernels.benchmarks.packed"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
