"""Folders of shards full of random tokens, made in a moment: for measurements and tests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from xlstm_io.shards.manifest import Manifest, split_fields, write_manifest
from xlstm_io.shards.rows import Block, token_dtype
from xlstm_io.shards.shard import default_block_rows, index_path
from xlstm_io.shards.writer import ShardWriter

_EMPTY = np.empty(0, np.uint32)


def write_shards(
    root: Path,
    shard_rows: Mapping[str, Sequence[int]],
    *,
    seq_len: int,
    vocab_size: int = 1000,
    block_rows: int | None = None,
    document_tokens: int = 500,
    valid_rows: int = 0,
    tokenizer: str = "synthetic",
    seed: int = 0,
) -> Manifest:
    """Write a folder in the shard format, without a corpus and without a tokenizer's file.

    Args:
        root: the folder.
        shard_rows: by source, the rows of each of its training shards.
        seq_len: tokens per row that are trained on.
        vocab_size: token numbers are below it.
        block_rows: rows per block; default as a build.
        document_tokens: mean length of the documents; every row begins with a new one.
        valid_rows: rows of the one validation shard of each source.
        tokenizer: names the tokenizer: another name, another hash.
        seed: which tokens and documents are drawn.
    """
    rng = np.random.default_rng(seed)
    dtype = token_dtype(vocab_size)
    block_rows = block_rows or default_block_rows(seq_len + 1, dtype)
    sources = []
    for name, sizes in shard_rows.items():
        splits = {}
        for split, rows_of in (("train", sizes), ("valid", [valid_rows] if valid_rows else [])):
            shards = [
                _shard(
                    root, f"{name}/{split}/shard-{number:08d}.tar", rows, seq_len + 1, rng,
                    vocab_size, block_rows, document_tokens,
                )
                for number, rows in enumerate(rows_of)
            ]  # fmt: skip
            splits[split] = split_fields(shards)
        sources.append(
            {
                "name": name,
                "provenance": None,
                "documents_read": splits["train"]["docs"] + splits["valid"]["docs"],
                "dropped": {},
                "splits": splits,
            }
        )
    fields = {
        "dtype": dtype.name,
        "seq_len": seq_len,
        "row_tokens": seq_len + 1,
        "block_rows": block_rows,
        "packing": "concat",
        "add_bos": True,
        "add_eos": True,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": 0,
        "tokenizer": {
            "type": "sentencepiece",
            "path": "tokenizer/tokenizer.model",
            "sha256": hashlib.sha256(tokenizer.encode()).hexdigest(),
            "vocab_size": vocab_size,
        },
        "valid_fraction": 0.0,
        "config_hash": "synthetic",
        "sources": sources,
        "code": {},
    }
    return write_manifest(root, fields)


def _shard(root, path, rows, row_tokens, rng, vocab_size, block_rows, document_tokens) -> dict:
    """One shard of random documents; its manifest entry."""
    docs = 0
    with ShardWriter(root / path) as writer:
        for first in range(0, rows, block_rows):
            size = min(block_rows, rows - first)
            tokens = rng.integers(3, vocab_size, (size, row_tokens)).astype(token_dtype(vocab_size))
            starts = rng.random((size, row_tokens)) < 1 / document_tokens
            starts[:, 0], starts[:, -1] = True, False
            row, position = np.nonzero(starts)
            tokens[starts] = 1
            offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=size))])
            block = Block(tokens, offsets.astype(np.uint32), position.astype(np.uint32), _EMPTY)
            writer.write(block)
            docs += len(position)
        written = writer.close()
    count = rows * row_tokens
    return {
        "path": path,
        "index": index_path(Path(path)).as_posix(),
        "tokens": count,
        "targets": count - docs,
        "pad_tokens": 0,
        "docs": docs,
        "bytes_in": count,
        **asdict(written),
    }
