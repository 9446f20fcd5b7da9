"""Packs what the proof needs on a machine with a GPU and without a network.

    python -m benchmarks.gpu_proof.pack --out build/gpu-pack

That machine has Python, torch and triton of the environment that packs. The archive brings the
rest: this checkout's last commit, wheels of what training imports, and kernels that are compiled
for Hopper already: all that the proof launches, which are found as long as triton and its ptxas are
the same. `sh run.sh` in the unpacked folder installs the wheels beside it and starts
`benchmarks.gpu_proof`. `--dry-run` downloads nothing and compiles one small kernel.

**The archive has not been used on a GPU yet.**
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tarfile
from importlib.metadata import packages_distributions, version
from pathlib import Path

LIMIT = 60 << 20  # bytes of the archive
TARGET = "sm_90"
ROOT = Path(__file__).parents[2]
# What the machine has.
THERE = ("torch", "triton", "numpy", "pip", "setuptools", "nvidia-", "cuda-", "xlstm-pretrain")
IMPORTED = (
    "pretrain.commands.run.train",
    "pretrain.engines.megatron",
    "benchmarks.loader.synthetic_shards",
)
# Triton's cache is looked up by this too.
ENVIRONMENT = {"TRITON_DEFAULT_FP_FUSION": "1"}
SMALL = "gated_forward"  # of a dry run

RUN = f"""#!/bin/sh
# Installs the wheels beside this file and starts the proof; benchmarks/gpu_proof/pack.py made it.
set -e
here=$(cd "$(dirname "$0")" && pwd)
python=${{PYTHON:-python3}}
[ -d "$here/site" ] || "$python" -m pip install --quiet --no-index --no-deps \\
  --target "$here/site" "$here"/wheels/*.whl
export PYTHONPATH="$here/site:$here/source:$here/source/kernels${{PYTHONPATH:+:$PYTHONPATH}}"
export TRITON_CACHE_DIR="$here/triton-cache" {" ".join(f"{k}={v}" for k, v in ENVIRONMENT.items())}
cd "$here/source"
exec "$python" -m benchmarks.gpu_proof --out "$here/proof" "$@"
"""


def imported_distributions() -> dict[str, str]:
    """Name and version of every package that training loads and that the machine may lack."""
    for name in IMPORTED:
        importlib.import_module(name)
    distributions = packages_distributions()
    tops = {name.partition(".")[0] for name in sys.modules}
    found = {one: version(one) for top in tops for one in distributions.get(top, ())}
    return {name: found[name] for name in sorted(found) if not name.lower().startswith(THERE)}


def download(packages: dict[str, str], folder: Path) -> None:
    """Wheels of exactly these versions for this Python."""
    pins = [f"{name}=={version}" for name, version in packages.items()]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--only-binary=:all:", "--dest", str(folder), *pins], check=True)


def compile_kernels(folder: Path, dry: bool) -> list[str]:
    """Fill Triton's cache with the kernels that the proof launches; their names."""
    os.environ |= {"TRITON_CACHE_DIR": str(folder), **ENVIRONMENT}
    from benchmarks.compiled.aot import compile_variant
    from benchmarks.kernel_variants import find_variants

    if dry:
        wanted = [one for one in find_variants(TARGET) if one.name.startswith(SMALL)][:1]
    else:
        from benchmarks.gpu_proof.launches import proof_variants

        wanted = proof_variants()
    for number, variant in enumerate(wanted, 1):
        print(f"{number}/{len(wanted)} {variant.name}", flush=True)
        compile_variant(variant, TARGET)
    return [variant.name for variant in wanted]


def pack(out: Path, dry: bool) -> Path:
    """Make the folder and the archive beside it.

    Args:
        out: the folder; it must not exist.
        dry: no wheels, and one kernel.

    Returns:
        The archive.
    """
    for name in ("wheels", "triton-cache", "source"):
        (out / name).mkdir(parents=True)
    packages = imported_distributions()
    if not dry:
        download(packages, out / "wheels")
    kernels = compile_kernels(out / "triton-cache", dry)
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    source = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(out / "source")], input=source.stdout, check=True)
    about = {"python": platform.python_version(), "triton": triton.__version__}
    about |= {"ptxas": get_ptxas(90).version, "packages": packages, "kernels": kernels}
    (out / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    (out / "run.sh").write_text(RUN, encoding="utf-8")
    archive = out.parent / f"{out.name}.tar.xz"
    with tarfile.open(archive, "w:xz") as file:
        file.add(out, out.name)
    return archive


def main() -> int:
    """Pack, and say how large it is; 1 where that is too large."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--dry-run", action="store_true", help="no wheels, and one small kernel")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"--out={options.out} exists; remove it, or give another folder")
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's functions cannot be compiled
    archive = pack(options.out.resolve(), options.dry_run)
    size = archive.stat().st_size
    print(f"{archive}: {size / 2**20:.1f} MiB (at most {LIMIT >> 20})")
    return int(size > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
