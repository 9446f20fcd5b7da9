"""Peak memory of an import in the layout of xLSTM 7B: its widths, random weights, few layers.

    python -m benchmarks.import_memory
    python -m benchmarks.import_memory --hidden 128 --layers 1

It writes a Hugging Face folder, imports it in a process of its own, and compares every tensor bit
by bit. What is printed is that process's peak of resident memory, beside that of one which only
starts. The process may take `LIMIT` bytes of address space beyond those of its start, so an import
that needs more fails. With the widths of the 7B and two layers the folder has 3.3 GB, and so has
the checkpoint.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from xlstm_io.checkpoint.manifest import resolve
from xlstm_io.checkpoint.reader import CheckpointReader
from xlstm_io.checkpoint.safetensors_stream import TensorHeader, write_safetensors
from xlstm_io.tensor_files import open_tensors
from xlstm_mcore.convert.cli import main as convert
from xlstm_mcore.convert.families import native_xlstm
from xlstm_mcore.convert.tables import rows
from xlstm_mcore.settings import ModelConfig

LIMIT = 2 << 30
CONVERT = "--convert"  # what follows is a command of the conversion, for the measured process


def write_folder(folder: Path, model: ModelConfig) -> None:
    """A Hugging Face folder of `model` with random weights in fp32, whose logits are some units.

    Biases of the gates are those of a fresh model. With others the logits of random weights depend
    on how fp32 rounds.
    """
    rng = torch.Generator().manual_seed(0)

    def values(header: TensorHeader) -> torch.Tensor:
        if header.key.endswith("igate_preact.bias"):
            return torch.full(header.shape, -10.0)
        if header.key.endswith("fgate_preact.bias"):
            return torch.linspace(3.0, 6.0, header.shape[0])
        if len(header.shape) == 1:
            return torch.ones(header.shape)
        return torch.randn(header.shape, generator=rng).mul_(header.shape[-1] ** -0.5)

    found = list(rows(native_xlstm.TABLE, model))
    headers = [TensorHeader(row.theirs, torch.float32, row.shape) for row in found]
    write_safetensors(folder / "model.safetensors", headers, values)
    ids = {"vocab_size": model.vocab_size, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    (folder / "config.json").write_text(json.dumps(native_xlstm.config(model) | ids))


def peak_mib(*words: str) -> float:
    """Peak resident memory of a command of the conversion, in MiB."""
    command = [sys.executable, "-m", "benchmarks.import_memory", CONVERT, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return int(done.stderr.split()[-1]) / 1024


def check_equal(folder: Path, run: Path, model: ModelConfig) -> None:
    """Compare every tensor of the checkpoint with the folder's."""
    with open_tensors(folder) as theirs, CheckpointReader(resolve(run)) as ours:
        for row in rows(native_xlstm.TABLE, model):
            if not torch.equal(ours.read(row.ours[0]), theirs.read(row.theirs)):
                raise SystemExit(f"{row.theirs} differs")


def main() -> None:
    """Parse the command line, measure, print."""
    if sys.argv[1:2] == [CONVERT]:
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + LIMIT, now + LIMIT))
        code = convert(sys.argv[2:])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)  # KiB
        sys.exit(code)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096, help="width of the model")
    parser.add_argument("--layers", type=int, default=2, help="how many blocks")
    parser.add_argument("--vocab", type=int, default=50304, help="rows of the embedding")
    options = parser.parse_args()
    model = ModelConfig(
        pattern="M" * options.layers,
        hidden_size=options.hidden,
        num_heads=8,
        vocab_size=options.vocab,
    )
    with tempfile.TemporaryDirectory() as root:
        folder, small, run = Path(root, "hf"), Path(root, "small"), Path(root, "run")
        folder.mkdir()
        small.mkdir()
        write_folder(folder, model)
        tiny = model.model_copy(update={"hidden_size": 64, "vocab_size": 8, "pattern": "M"})
        write_folder(small, tiny)
        start = peak_mib("from-hf", str(small), "--dry-run")
        peak = peak_mib("from-hf", str(folder), str(run))
        check_equal(folder, run, model)
        size = (folder / "model.safetensors").stat().st_size / 2**20
    largest = 4 * options.hidden * max(options.vocab, 2.667 * options.hidden) / 2**20
    print(f"weights           {size:9.0f} MiB, every tensor equal after the import")
    print(f"largest tensor    {largest:9.0f} MiB")
    print(f"peak of an import {peak:9.0f} MiB, of which {start:.0f} MiB are there at its start")
    print(f"limit             {LIMIT / 2**20:9.0f} MiB of address space beyond those of its start")


if __name__ == "__main__":
    main()
