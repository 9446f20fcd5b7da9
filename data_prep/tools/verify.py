"""Checks a folder of shards against its manifest: sizes and indices, or every byte."""

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from data_prep.jobs.progress import Progress, say
from xlstm_io.errors import PrepError, TokenizerFileError
from xlstm_io.shards.index import CorruptShardError
from xlstm_io.shards.manifest import (
    MANIFEST_NAME,
    TOTALS,
    Manifest,
    ShardEntry,
    data_hash,
    load_manifest,
)
from xlstm_io.shards.rows import CONTINUATION, PADDING, POSITION_MASK, Block, no_label, row_masks
from xlstm_io.shards.shard import ShardReader
from xlstm_io.terminal import counted
from xlstm_io.tokenizer import open_tokenizer


def verify(out: Path, *, full: bool = False) -> Manifest:
    """Check a folder; print every problem and raise at the end if there was one.

    It always checks the manifest's checksum and hash, the tokenizer (its hash, its vocabulary, the
    ids around documents), and size and index of every shard. `full` adds the hash of every tar and
    of every block, the tar's member names (what a plain webdataset reader sees), ids below the
    vocabulary, row structure, and the counts of the manifest.

    Args:
        out: folder of shards.
        full: read and hash every byte.

    Raises:
        PrepError: something is wrong.
        ShardFormatError: no usable manifest at all.
    """
    manifest = load_manifest(out)
    problems = list(_tokenizer_problems(manifest))
    if manifest.hash != data_hash(manifest.root):
        problems.append(f"{manifest.root / MANIFEST_NAME}: its hash is not that of its data")
    entries = manifest.all_shards()
    with Progress("verify", sum(entry.bytes for entry in entries)) as progress:
        done = 0
        for entry in entries:
            problems += _shard_problems(manifest, entry, full)
            done += entry.bytes
            progress.set(done)
    for source in manifest.sources:
        for name, split in source.splits.items():
            for key in TOTALS:
                total = sum(getattr(entry, key) for entry in split.shards)
                if total != getattr(split, key):
                    stated = getattr(split, key)
                    problems.append(f"{source.name}/{name}: {key} {stated}, shards have {total}")
    for problem in problems:
        say(f"problem: {problem}")
    if problems:
        raise PrepError(
            f"{out}: {counted(len(problems), 'problem')}, listed above; restore these files, or "
            "delete those of a shard and run `python -m data_prep build` again"
        )
    size = sum(entry.bytes for entry in entries) / 1e6
    depth = "every block hashed" if full else "sizes and indices; --full hashes every block"
    say(f"{out}: {counted(len(entries), 'shard')}, {size:.1f} MB, no problem ({depth})")
    return manifest


def _tokenizer_problems(manifest: Manifest) -> Iterator[str]:
    try:
        tokenizer = open_tokenizer(manifest.tokenizer_path)
    except TokenizerFileError as error:
        yield str(error)
        return
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        yield (
            f"{manifest.tokenizer_path}: sha256 {tokenizer.sha256}, expected "
            f"{manifest.tokenizer_sha256}"
        )
    expected = {"vocab_size": tokenizer.vocab_size, "type": tokenizer.kind}
    for key, value in expected.items():
        if (stated := getattr(manifest.tokenizer, key)) != value:
            yield f"{manifest.tokenizer_path} has {key}={value}, the manifest says {stated}"
    for name in ("bos_id", "eos_id"):
        if (found := getattr(tokenizer, name)) not in (None, getattr(manifest, name)):
            yield (
                f"{manifest.tokenizer_path} has {name}={found}, the manifest says "
                f"{getattr(manifest, name)}"
            )


def _shard_problems(manifest: Manifest, entry: ShardEntry, full: bool) -> list[str]:
    reader = None
    try:
        reader = ShardReader(manifest, entry)
        return list(_content_problems(manifest, entry, reader)) if full else []
    except CorruptShardError as error:
        return [str(error)]
    finally:
        if reader is not None:
            reader.close()


def _content_problems(manifest: Manifest, entry: ShardEntry, reader: ShardReader) -> Iterator[str]:
    damaged = False
    docs = targets = 0
    for number in range(reader.num_blocks):
        try:
            block = reader.block(number)
        except CorruptShardError as error:
            damaged = True
            yield str(error)
            continue
        yield from (f"{reader.path}: block {number}: {p}" for p in _label_problems(block))
        docs_here, targets_here = count_block(block, manifest.seq_len)
        docs, targets = docs + docs_here, targets + targets_here
    with open(reader.path, "rb") as file:
        xxh3 = hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()
    if xxh3 != entry.xxh3 and not damaged:
        yield str(CorruptShardError(reader.path, None, 0, f"xxh3 {entry.xxh3}", xxh3))
    if damaged:
        return
    kinds = ("tok", "doc", "lab") if manifest.labels else ("tok", "doc")
    names = [f"b{n:06d}.{kind}" for n in range(reader.num_blocks) for kind in kinds]
    try:
        with tarfile.open(reader.path) as tar:
            found = tar.getnames()
    except tarfile.TarError as error:
        found = [str(error)]
    if found != names:
        yield f"{reader.path}: members {found[:4]}..., expected {names[:4]}..."
    if (docs, targets) != (entry.docs, entry.targets):
        yield (
            f"{reader.path}: {docs} documents and {targets} targets, the manifest says "
            f"{entry.docs} and {entry.targets}"
        )


def count_block(block: Block, seq_len: int) -> tuple[int, int]:
    """(documents that start in a block, targets that its labels or its loss masks leave)."""
    if block.labels is not None:
        targets = int((block.labels != no_label(block.labels.dtype)).sum())
    else:
        shape = (len(block.tokens), seq_len)
        targets = int(row_masks(block.segment_rows(), block.segments, shape)[0].sum())
    starts = (block.segments & np.uint32(CONTINUATION | PADDING)) == 0
    # A start at the shared last position is counted by the row that it begins, if there is one.
    counted = starts & ((block.segments & np.uint32(POSITION_MASK)) < seq_len)
    return int(counted.sum()), targets


def _label_problems(block: Block) -> Iterator[str]:
    """Labels where they cannot be."""
    if block.labels is not None:
        position = (block.segments & np.uint32(POSITION_MASK)).astype(np.int64)
        labelled = block.labels != no_label(block.labels.dtype)
        padding = (block.segments & np.uint32(PADDING)) != 0
        for row, start in zip(block.segment_rows()[padding], position[padding], strict=True):
            if labelled[row, start:].any():
                yield f"row {row} has labels in its padding"
