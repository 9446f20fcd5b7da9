"""Writes the samples of a task as folders of shards.

    OUT/train/               splits train and valid, at the lengths of training
    OUT/validation-256/      split valid alone, at another length; one folder for each

The hash of a sample says whether it is for training or for validation, as that of a document does
in a build. So no sample is in both, whatever the seeds and lengths of the folders are.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.build.report import code_fields, format_fields
from data_prep.jobs.progress import Progress, say
from data_prep.synthetic.rows import as_blocks
from data_prep.synthetic.task import Samples, Span, Task, inside
from data_prep.tools.finished import is_finished
from xlstm_io.errors import PrepError
from xlstm_io.shards.manifest import (
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    load_manifest,
    place_of,
    split_fields,
    write_manifest,
)
from xlstm_io.shards.rows import token_dtype
from xlstm_io.shards.shard import index_path
from xlstm_io.shards.writer import ShardWriter
from xlstm_io.storage import write_atomic
from xlstm_io.tokenizer.base import SYMBOLS_NAME
from xlstm_io.tokenizer.symbols import SymbolsTokenizer

VALID_SHARE = 0.125
"""Share of all possible samples that are for validation."""

_STATE_NAME = "synthetic.json"
_VERSION = 1  # of the generators: a change of what they draw makes other corpora
_BATCH_TOKENS = 1 << 18
_SHARD_TOKENS = 1 << 23
_FRUITLESS_BATCHES = 200  # after so many without a sample there are none
_SOURCE = "task"


@dataclass(frozen=True)
class Split:
    """What one split of a folder is made of.

    Attributes:
        name: "train" or "valid".
        samples: how many.
        span: their lengths.
    """

    name: str
    samples: int
    span: Span


def write_corpora(name: str, task: Task) -> list[Manifest]:
    """Write the folders of a task; what is finished is kept.

    Args:
        name: of the task.
        task: with its settings.

    Raises:
        PrepError: settings that contradict each other, lengths that the task cannot make, or
            `task.out` holds something else.
    """
    task.check()
    span = Span.parse(task.length, "--length")
    others = [Span.parse(text, "--validation-length") for text in task.validation_length]
    for each in (span, *others):
        task.possible_lengths(each)
    if task.samples < 1 or task.validation_samples < 1:
        raise PrepError(
            f"--samples {task.samples} --validation-samples {task.validation_samples}: there must "
            "be one of each at least"
        )
    if task.seed < 0:
        raise PrepError(f"--seed {task.seed}: must not be negative")
    if task.seq_len is not None and task.seq_len < span.high:
        raise PrepError(
            f"--seq-len {task.seq_len} holds no sample of {span.high} tokens; leave it out, or "
            "lower --length"
        )
    valid = Split("valid", task.validation_samples, span)
    folders = {"train": [Split("train", task.samples, span), valid]}
    for each in others:
        folders[f"validation-{each}"] = [Split("valid", task.validation_samples, each)]
    return [_write_folder(name, task, folder, splits) for folder, splits in folders.items()]


def _write_folder(name: str, task: Task, folder: str, splits: list[Split]) -> Manifest:
    out = task.out / folder
    longest = max(split.span.high for split in splits)
    seq_len = max(2, longest, task.seq_len or 0)
    settings = _settings(name, task, seq_len, splits)
    if is_finished(out, _STATE_NAME, settings):
        say(f"{out} is finished: nothing to do")
        return load_manifest(out)
    write_atomic(out / "_work" / _STATE_NAME, json.dumps(settings).encode() + b"\n")
    place, symbols = place_of(out, f"tokenizer/{SYMBOLS_NAME}"), task.symbols()
    tokenizer = SymbolsTokenizer(place, {SYMBOLS_NAME: SymbolsTokenizer.file_of(symbols)})
    write_atomic(place, tokenizer.files[SYMBOLS_NAME])
    made = {split.name: list(_shards(name, task, out, split, seq_len)) for split in splits}
    source = {
        "name": _SOURCE,
        "provenance": {"origin": f"generated: {name}", **settings["options"]},
        "documents_read": sum(entry.docs for entries in made.values() for entry in entries),
        "dropped": {},
        "splits": {key: split_fields([e.model_dump() for e in made[key]]) for key in made},
    }
    fields = {
        **format_fields(
            tokenizer,
            seq_len=seq_len,
            packing="best_fit",
            valid_fraction=VALID_SHARE,
            labels=True,
        ),
        "code": code_fields(),
        "config_hash": hashlib.sha256(json.dumps(settings).encode()).hexdigest(),
        "sources": [source],
    }
    manifest = write_manifest(out, fields)
    for key, split in manifest.sources[0].splits.items():
        say(
            f"{out} {key}: {split.docs} samples, {split.tokens} tokens, {split.targets} labels, "
            f"{split.rows} rows of {seq_len}"
        )
    say(f"manifest {out / MANIFEST_NAME}  hash {manifest.hash[:12]}")
    return manifest


def _settings(name: str, task: Task, seq_len: int, splits: list[Split]) -> dict[str, Any]:
    """All that the contents of a folder depend on."""
    common = {field.name for field in fields(Task)}
    own = {f.name: getattr(task, f.name) for f in fields(task) if f.name not in common}
    return {
        "version": _VERSION,
        "task": name,
        "options": {**own, "seed": task.seed},
        "seq_len": seq_len,
        "splits": {split.name: [split.samples, str(split.span)] for split in splits},
    }


def _shards(name: str, task: Task, out: Path, split: Split, seq_len: int) -> Iterator[ShardEntry]:
    """Write the shards of a split."""
    symbols = task.symbols()
    token_bytes = token_dtype(len(symbols)).itemsize
    total = split.samples * (split.span.low + split.span.high) // 2

    def followed(batches: Iterator[Samples]) -> Iterator[Samples]:
        tokens = 0
        for batch in batches:
            tokens += int(batch.lengths.sum())
            progress.set(tokens * token_bytes)
            yield batch

    with Progress(f"{name} {split.name}", total * token_bytes) as progress:
        for number, batches in enumerate(_groups(followed(_batches(name, task, split)))):
            path = f"{_SOURCE}/{split.name}/shard-{number:08d}.tar"
            yield _write_shard(out, path, batches, seq_len, symbols)


def _groups(batches: Iterator[Samples]) -> Iterator[list[Samples]]:
    """The batches of each shard."""
    held: list[Samples] = []
    for batch in batches:
        held.append(batch)
        if sum(int(each.lengths.sum()) for each in held) >= _SHARD_TOKENS:
            yield held
            held = []
    if held:
        yield held


def _write_shard(
    out: Path, path: str, batches: list[Samples], seq_len: int, symbols: list[str]
) -> ShardEntry:
    """Write one shard."""
    dtype = token_dtype(len(symbols))
    text_bytes = np.array([len(symbol.encode()) + 1 for symbol in symbols])  # with a blank
    docs, tokens = sum(map(len, batches)), sum(int(batch.lengths.sum()) for batch in batches)
    with ShardWriter(place_of(out, path)) as writer:
        for block in as_blocks(batches, seq_len, dtype):
            writer.write(block)
        written = writer.close()
    texts = (batch.tokens[inside(batch.lengths, batch.tokens.shape[1])] for batch in batches)
    return ShardEntry(
        path=path,
        index=index_path(Path(path)).as_posix(),
        rows=written.rows,
        tokens=tokens,
        targets=sum(int((batch.labels >= 0).sum()) for batch in batches),
        pad_tokens=written.rows * (seq_len + 1) - tokens,
        docs=docs,
        bytes_in=sum(int(text_bytes[text].sum()) for text in texts) - docs,
        bytes=written.bytes,
        xxh3=written.xxh3,
        index_xxh3=written.index_xxh3,
    )


def _batches(name: str, task: Task, split: Split) -> Iterator[Samples]:
    """The samples of a split, in batches.

    Raises:
        PrepError: none of many draws was of the split.
    """
    rng = np.random.default_rng([task.seed, *name.encode(), *f"{split.name} {split.span}".encode()])
    count = max(1, _BATCH_TOKENS // split.span.high)
    left, fruitless = split.samples, 0
    while left:
        drawn = task.draw(rng, count, split.span)
        found = drawn[is_for_validation(drawn) == (split.name == "valid")][:left]
        left -= len(found)
        fruitless = 0 if len(found) else fruitless + 1
        if fruitless == _FRUITLESS_BATCHES:
            raise PrepError(
                f"--length {split.span}: none of {fruitless * count} samples was for {split.name}; "
                "ask for lengths of which there are more"
            )
        if len(found):
            yield found


def is_for_validation(samples: Samples) -> np.ndarray:
    """Bool `[n]`: whether a sample is for validation, by a hash of its tokens alone."""
    width = samples.tokens.shape[1]
    factors = _mixed(np.arange(1, width + 1, dtype=np.uint64)) | np.uint64(1)
    with np.errstate(over="ignore"):
        terms = (samples.tokens.astype(np.uint64) + np.uint64(1)) * factors
        sums = np.where(inside(samples.lengths, width), terms, np.uint64(0)).sum(1)
    return _mixed(sums) < np.uint64(int(VALID_SHARE * 2**64))


def _mixed(values: np.ndarray) -> np.ndarray:
    """Splitmix64 of each number: a change of any bit changes about half of the bits."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
