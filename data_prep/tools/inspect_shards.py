"""Shows what a folder of shards holds: its totals, or one row as text with its documents marked."""

from pathlib import Path

import numpy as np

from xlstm_io.errors import PrepError
from xlstm_io.shards.manifest import Manifest, load_manifest
from xlstm_io.shards.rows import CONTINUATION, PADDING, POSITION_MASK, no_label
from xlstm_io.shards.shard import ShardReader
from xlstm_io.terminal import counted
from xlstm_io.tokenizer import Tokenizer, open_tokenizer


def describe(out: Path) -> str:
    """Totals of every source and split, format and tokenizer, as printable lines."""
    manifest = load_manifest(out)
    lines = [
        f"{manifest.root}  hash {manifest.hash[:12]}",
        f"rows of {manifest.seq_len} tokens (+1), {manifest.dtype}, {manifest.packing}"
        f"{', with labels' if manifest.labels else ''}; "
        f"{manifest.block_rows} rows a block",
        f"tokenizer {manifest.tokenizer.type}, {manifest.vocab_size} pieces, "
        f"bos {manifest.bos_id}, eos {manifest.eos_id}, pad {manifest.pad_id}, "
        f"sha256 {manifest.tokenizer_sha256[:12]}",
    ]
    for source in manifest.sources:
        dropped = ", ".join(f"{count} {reason}" for reason, count in source.dropped.items())
        lines.append(f"source {source.name}: {source.documents_read} documents read; {dropped}")
        for key, value in (source.provenance or {}).items():
            lines.append(f"    {key}: {value}")
        for name, split in source.splits.items():
            lines.append(
                f"  {name}: {split.docs} documents, {split.tokens} tokens, {split.rows} rows, "
                f"{split.pad_tokens} padding, {split.bytes_in / 1e6:.2f} MB text, "
                f"{counted(len(split.shards), 'shard')}"
            )
    return "\n".join(lines)


def show_row(out: Path, row: int, split: str = "train") -> str:
    """Row `row` of a split as text. Each document is introduced by a line that marks it.

    Raises:
        PrepError: no such row.
        CorruptShardError: the row's block is damaged.
    """
    manifest = load_manifest(out)
    entries = manifest.shards(split)
    total = sum(entry.rows for entry in entries)
    if not 0 <= row < total:
        there = f"the rows 0 to {total - 1}" if total else "no rows"
        raise PrepError(f"--row {row}: the split {split!r} has {there}; use one of them")
    tokenizer = open_tokenizer(manifest.tokenizer_path)
    local = row
    for entry in entries:
        if local < entry.rows:
            break
        local -= entry.rows
    reader = ShardReader(manifest, entry)
    tokens = np.empty(manifest.row_tokens, reader.dtype)
    labels = np.full(manifest.row_tokens, no_label(reader.dtype), reader.dtype)
    try:
        segments = reader.row(local, tokens, labels[:-1] if manifest.labels else None)
    finally:
        reader.close()
    lines = [f"row {row} of {split}: {entry.path}, row {local} of the shard"]
    return "\n".join(lines + _marked(manifest, tokenizer, tokens, segments, labels))


def _marked(
    manifest: Manifest,
    tokenizer: Tokenizer,
    tokens: np.ndarray,
    segments: np.ndarray,
    labels: np.ndarray,
) -> list[str]:
    starts = (segments & np.uint32(POSITION_MASK)).tolist()
    ends = [*starts[1:], manifest.row_tokens]
    lines = []
    for start, end, segment in zip(starts, ends, segments, strict=True):
        kind = "document starts"
        if segment & CONTINUATION:
            kind = "document continues from an earlier row"
        if segment & PADDING:
            kind = "padding"
        lines.append(f"--- tokens {start}..{end - 1}: {kind}")
        if not segment & PADDING:
            lines.append(tokenizer.decode(tokens[start:end]))
            lines += _labels(tokenizer, labels, start, end)
    return lines


def _labels(tokenizer: Tokenizer, labels: np.ndarray, start: int, end: int) -> list[str]:
    """A line for each run of neighbouring positions with labels."""
    places = start + np.flatnonzero(labels[start:end] != no_label(labels.dtype))
    runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    return [
        f"    labels of {run[0]}{f'..{run[-1]}' if len(run) > 1 else ''}: "
        f"{tokenizer.decode(labels[run])}"
        for run in runs
        if len(run)
    ]
