"""Makes the golden run of a version: ``python -m tests.data.golden.make FOLDER``.

Everything is fixed: the texts, the seeds and the number of threads. README.md says what is made
and when.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import xxhash

import data_prep.cli
import pretrain.commands.run.train
from pretrain import layout
from pretrain.config import load_config
from pretrain.watching.metrics import read_metrics
from tests.data_prep.small_corpus import make_texts, write_jsonl
from xlstm_io.checkpoint.manifest import step_folders, step_of_folder
from xlstm_io.checkpoint.reader import CheckpointReader, TensorSlice
from xlstm_io.checkpoint.safetensors_stream import bytes_of

STEPS, SAVED = 6, 3
RUN = f"""\
run: {{dir: run, steps: {STEPS}, seed: 3}}
model: {{pattern: "Mms*", hidden_size: 32, num_heads: 2, vocab_size: 640}}
data: {{path: shards, seq_len: 64, global_batch: 8, micro_batch: 4}}
optimizer: {{lr: 1.0e-3}}
schedule: {{name: constant}}
checkpoint: {{interval: {SAVED}}}
evaluation: {{interval: 100, max_batches: 1}}
logging: {{interval: 1, tensorboard: false}}
"""


def hash_of(tensor: torch.Tensor) -> dict[str, Any]:
    """What a tensor must be for ever: its dtype, its shape and the hash of its bytes."""
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "xxh3": xxhash.xxh3_64_hexdigest(bytes_of(tensor.contiguous())),
    }


def hashes_of(slices: list[TensorSlice]) -> dict[str, dict[str, Any]]:
    """By global name; one process holds every tensor whole, or as runs of rows."""
    tensors: dict[str, torch.Tensor] = {}
    for part in slices:
        whole = tensors.setdefault(part.name, part.tensor.new_empty(part.global_shape))
        place = zip(part.global_offset, part.tensor.shape, strict=True)
        whole[tuple(slice(begin, begin + size) for begin, size in place)] = part.tensor.detach()
    return {name: hash_of(tensors[name]) for name in sorted(tensors)}


def stored_hashes(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """By global name, as the checkpoint's reader gives the tensors."""
    with CheckpointReader(checkpoint) as reader:
        return {name: hash_of(reader.read(name)) for name in sorted(reader.manifest.tensors)}


def train(folder: Path) -> dict[int, float]:
    """Train as run.yaml says, from the newest checkpoint; losses by step."""
    before = Path.cwd()
    os.chdir(folder)  # the paths in run.yaml are relative
    try:
        layout.leave()  # a group that this process may have joined for something else
        assert pretrain.commands.run.train.main(load_config("run.yaml")) == 0
    finally:
        layout.leave()
        os.chdir(before)
    records = read_metrics(folder / "run" / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def prepare(folder: Path) -> None:
    """Texts, tokenizer and shards."""
    corpus = write_jsonl(folder / "corpus.jsonl", make_texts(400))
    tokenizer = folder / "tokenizer"
    words = ["tokenizer", "--input", corpus, "--vocab-size", 330, "--out", tokenizer]
    assert data_prep.cli.main([str(word) for word in words]) == 0
    words = ["build", "--input", corpus, "--tokenizer", tokenizer, "--out", folder / "shards"]
    words += ["--seq-len", 64, "--valid-fraction", 0.05, "--workers", 1]
    assert data_prep.cli.main([str(word) for word in words]) == 0
    shutil.rmtree(folder / "shards" / "_work", ignore_errors=True)
    shutil.rmtree(tokenizer)
    corpus.unlink()


def make(folder: Path) -> None:
    """Shards, a run of six steps of which the third's checkpoint is kept, losses and hashes."""
    folder.mkdir(parents=True)
    prepare(folder)
    (folder / "run.yaml").write_text(RUN)
    (folder / "losses.json").write_text(json.dumps(train(folder), indent=1) + "\n")
    saved, *later = sorted(step_folders(folder / "run"), key=step_of_folder)
    for path in later:
        shutil.rmtree(path)
    (folder / "run" / "metrics.jsonl").unlink()
    (folder / "hashes.json").write_text(json.dumps(stored_hashes(saved), indent=1) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
