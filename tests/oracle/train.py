"""Trains transformers' `xlstm` in plain torch, from the words of the documentation alone.

    python -m tests.oracle.train RUN.yaml HF_FOLDER LOSSES.json

It imports torch, transformers, webdataset, numpy and yaml, and nothing of this project: the model
is transformers', shards are read as docs/shards.md says, and the order of rows, the learning rate,
clipping and weight decay are written down here a second time. One process, fp32. A document never
sees another one because each goes through the model in a row of its own.
"""

import glob
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
import yaml
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

CHUNK = 64  # transformers' training form takes whole chunks
U64 = (1 << 64) - 1


def read_rows(shards, split):
    """All rows of a split in their order: (tokens, where documents and padding begin)."""
    manifest = json.loads(Path(shards, "manifest.json").read_text())
    rows = []
    files = sorted(glob.glob(f"{shards}/*/{split}/*.tar"))
    for sample in wds.WebDataset(files, shardshuffle=False, empty_check=False):
        tokens = np.frombuffer(sample["tok"], manifest["dtype"])
        tokens = tokens.reshape(-1, manifest["row_tokens"]).astype(np.int64)
        numbers = np.frombuffer(sample["doc"], "<u4")
        offsets, segments = numbers[: len(tokens) + 1], numbers[len(tokens) + 1 :]
        for row, begin, end in zip(tokens, offsets, offsets[1:], strict=False):
            rows.append((row, segments[begin:end]))
    return rows


def documents(row, segments):
    """(inputs, targets) of each document of a row; a document's first token has no prediction."""
    starts = [int(s) & (1 << 30) - 1 for s in segments] + [len(row)]
    for segment, begin, end in zip(segments, starts, starts[1:], strict=False):
        # The last token of a document would predict the first one of the next.
        if not int(segment) & 1 << 30 and end - begin > 1:
            yield row[begin : end - 1], row[begin + 1 : end]


def mix(x):
    """The finaliser of splitmix64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & U64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & U64
    return x ^ (x >> 31)


def row_of(sample, size, seed):
    """Which row the run reads as its `sample`: a Feistel network, walked until it is in range."""
    epoch, value = divmod(sample, size)
    base = mix((mix(seed & U64) + epoch + 0x9E3779B97F4A7C15) & U64)
    keys = [mix((base + number) & U64) for number in range(1, 7)]
    bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    while True:
        left, right = value >> bits, value & mask
        for key in keys:
            left, right = right, left ^ (mix((right + key) & U64) & mask)
        value = left << bits | right
        if value < size:
            return value


def loss_sum(model, batch):
    """Summed loss in nats and number of targets of a list of (inputs, targets)."""
    length = -(-max(len(inputs) for inputs, _ in batch) // CHUNK) * CHUNK
    inputs = torch.zeros(len(batch), length, dtype=torch.long)
    targets = torch.full((len(batch), length), -100)
    for number, (tokens, wanted) in enumerate(batch):
        inputs[number, : len(tokens)] = torch.from_numpy(tokens.copy())
        targets[number, : len(wanted)] = torch.from_numpy(wanted.copy())
    logits = model(input_ids=inputs, use_cache=False).logits.float()
    total = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return total, int((targets != -100).sum())


def by_length(batch, tokens):
    """Cut a batch of documents into parts of similar lengths and of at most so many tokens."""
    part = []
    for one in sorted(batch, key=lambda one: len(one[0])):
        if part and (len(part) + 1) * (-(-len(one[0]) // CHUNK) * CHUNK) > tokens:
            yield part
            part = []
        part.append(one)
    yield part


def learning_rate(step, run):
    """Linear warmup, then a cosine down to `min_lr_ratio`."""
    peak, schedule = run["optimizer"]["lr"], run["schedule"]
    warmup, floor = schedule["warmup_steps"], schedule["min_lr_ratio"]
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / (run["run"]["steps"] - warmup))
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)


def parameter_groups(model, decay):
    """Matrices decay; the embedding, norms and biases do not."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() > 1 and "embeddings" not in name
        (decayed if matrix else plain).append(parameter)
    return [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]


def validation_loss(model, rows, tokens):
    """Mean loss in nats per target over all rows."""
    batch = [document for row in rows for document in documents(*row)]
    with torch.no_grad():
        sums = [loss_sum(model, part) for part in by_length(batch, tokens)]
    return sum(total.item() for total, _ in sums) / sum(count for _, count in sums)


def main(run_file, folder, output):
    """Train as the run file says; write the loss of every step, and of the validation split."""
    run = yaml.safe_load(Path(run_file).read_text())
    data, options = run["data"], run["optimizer"]
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, mode="train", autocast_kernel_dtype="float32",
        chunk_size=CHUNK,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(
        parameter_groups(model, options["weight_decay"]), betas=tuple(options["betas"]), eps=1e-8
    )
    rows = read_rows(data["path"], "train")
    tokens = data["micro_batch"] * data["seq_len"]
    losses = []
    for step in range(run["run"]["steps"]):
        first = step * data["global_batch"]
        chosen = [
            rows[row_of(first + number, len(rows), run["run"]["seed"])]
            for number in range(data["global_batch"])
        ]
        batch = [document for row in chosen for document in documents(*row)]
        targets = sum(len(wanted) for _, wanted in batch)
        summed = 0.0
        for part in by_length(batch, tokens):
            total, _ = loss_sum(model, part)
            (total / targets).backward()
            summed += total.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options["clip_grad"])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, run)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(summed / targets)
    final = validation_loss(model, read_rows(data["path"], "valid"), tokens)
    Path(output).write_text(json.dumps({"train": losses, "valid": final}))


if __name__ == "__main__":
    main(*sys.argv[1:])
