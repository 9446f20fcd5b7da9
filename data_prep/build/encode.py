"""Second pass: one planned shard -> tokens -> rows -> tar. Each shard stands alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_prep.build.pack import as_stored, make_packer
from data_prep.build.plan import SPLITS, ShardPlan
from data_prep.build.scan import FileScan, InputFile, text_hash
from data_prep.jobs.workers import Tick
from data_prep.sources.readers import Document, read_documents
from xlstm_io.errors import PrepError
from xlstm_io.shards.manifest import ShardEntry
from xlstm_io.shards.rows import token_dtype
from xlstm_io.shards.shard import ShardWriter, default_block_rows, index_path
from xlstm_io.storage import write_atomic
from xlstm_io.tokenizer import Tokenizer, open_tokenizer

_BATCH_BYTES = 1 << 18
BINS_PER_OCTAVE = 4  # of the histogram of lengths
_BINS = 40 * BINS_PER_OCTAVE
_ROUND_TRIPS = 32  # documents of each shard that are decoded again and compared


@dataclass(frozen=True)
class ShardPart:
    """The rows ``first`` to ``last`` of one file's scan; their fates start at ``fates_at``."""

    file: InputFile
    scan: FileScan
    fates_at: int
    first: int
    last: int


@dataclass(frozen=True)
class EncodeTask:
    """All that a worker needs for one shard."""

    plan: ShardPlan
    parts: list[ShardPart]
    fate: str
    tokenizer: str
    tokenizer_sha256: str
    out: Path
    seq_len: int
    packing: str

    @property
    def tar(self) -> Path:
        """Final path of the shard."""
        return shard_path(self.out, self.plan)


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard: its manifest entry, and figures for the report."""

    entry: ShardEntry
    histogram: list[int]
    """Documents by floor(BINS_PER_OCTAVE * log2(tokens))."""
    round_trips: int
    lossy: int


def shard_path(out: Path, plan: ShardPlan) -> Path:
    """``OUT/<source>/<split>/shard-00000042.tar``."""
    return out / plan.source / plan.split / f"shard-{plan.number:08d}.tar"


def record_path(out: Path, plan: ShardPlan) -> Path:
    """The ledger's note on a shard."""
    return out / "_work" / "done" / f"{plan.source}-{plan.split}-{plan.number:08d}.json"


def load_record(out: Path, plan: ShardPlan) -> ShardRecord | None:
    """The ledger's note on a shard; None unless its files are there with the noted size."""
    tar = shard_path(out, plan)
    try:
        stored = json.loads(record_path(out, plan).read_bytes())
        record = ShardRecord(ShardEntry(**stored.pop("entry")), **stored)
        intact = tar.stat().st_size == record.entry.bytes and index_path(tar).exists()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if intact else None


def encode_shard(task: EncodeTask, tick: Tick) -> ShardRecord:
    """Tokenize, pack and write one shard, then note it in the ledger."""
    tokenizer = _tokenizer_of_worker(task.tokenizer, task.tokenizer_sha256)
    ids = tokenizer.document_ids()
    dtype = token_dtype(tokenizer.vocab_size)
    packer = make_packer(
        task.packing,
        task.seq_len,
        default_block_rows(task.seq_len + 1, dtype),
        dtype,
        ids.pad,
    )
    histogram = np.zeros(_BINS, np.int64)
    checked = lossy = 0
    with ShardWriter(task.tar) as writer:
        for texts, size in _batches(task):
            encoded = tokenizer.encode(texts)
            if checked < _ROUND_TRIPS:
                lossy += _count_lossy(tokenizer, texts, encoded, _ROUND_TRIPS - checked)
                checked = min(_ROUND_TRIPS, checked + len(texts))
            lengths = np.array([len(document) + 2 for document in encoded])
            bins = (BINS_PER_OCTAVE * np.log2(lengths)).astype(np.int64)
            histogram += np.bincount(bins, minlength=_BINS)
            for document in encoded:
                tokens = as_stored(document, ids.bos, ids.eos, dtype)
                for block in packer.add(tokens):
                    writer.write(block)
            tick(size)
        for block in packer.finish():
            writer.write(block)
        written = writer.close()
    entry = ShardEntry(
        path=task.tar.relative_to(task.out).as_posix(),
        index=index_path(task.tar).relative_to(task.out).as_posix(),
        tokens=packer.tokens,
        targets=packer.tokens - packer.docs,  # the first token of a document is nobody's target
        pad_tokens=packer.pad_tokens,
        docs=packer.docs,
        bytes_in=task.plan.bytes_in,
        **written,
    )
    record = ShardRecord(entry, histogram.tolist(), checked, lossy)
    stored = {**record.__dict__, "entry": entry.model_dump()}
    path = record_path(task.out, task.plan)
    write_atomic(path, json.dumps(stored).encode() + b"\n")
    return record


@lru_cache(maxsize=1)
def _tokenizer_of_worker(path: str, sha256: str) -> Tokenizer:
    """The tokenizer of a worker process, opened once; `sha256` makes a changed file a miss."""
    tokenizer = open_tokenizer(path)
    if tokenizer.sha256 != sha256:
        raise PrepError(f"--tokenizer {path}: changed while the build was running; run it again")
    return tokenizer


def _count_lossy(tokenizer: Tokenizer, texts, encoded, limit: int) -> int:
    pairs = list(zip(texts, encoded, strict=True))[:limit]
    return sum(tokenizer.decode(ids) != text for text, ids in pairs)


def _batches(task: EncodeTask) -> Iterator[tuple[list[str], int]]:
    """The shard's texts in order, in batches of about 256 KB; each with its UTF-8 bytes.

    Raises:
        PrepError: a file no longer holds what the scan saw.
    """
    texts: list[str] = []
    size = 0
    for part in task.parts:
        count, offset = part.last - part.first, part.fates_at + part.first
        fates = np.fromfile(task.fate, np.uint8, count, offset=offset)
        chosen = part.first + np.flatnonzero(fates == SPLITS[task.plan.split])
        rows = part.scan.rows()[chosen]
        expected = iter(zip(rows["record"].tolist(), rows["hash"].tolist(), strict=True))
        offset = int(rows["offset"][0])
        for item in read_documents(part.file.path, part.file.fields, rows["record"], offset):
            record, digest = next(expected, (None, None))
            data = item.text.encode("utf-8") if isinstance(item, Document) else b""
            if record != item.record or tuple(digest) != text_hash(data):
                raise _changed(part)
            texts.append(item.text)
            size += len(data)
            if size >= _BATCH_BYTES:
                yield texts, size
                texts, size = [], 0
        if next(expected, None) is not None:
            raise _changed(part)
    if texts:
        yield texts, size


def _changed(part: ShardPart) -> PrepError:
    Path(part.scan.table).unlink(missing_ok=True)  # the next run scans the file again
    return PrepError(f"{part.file.path} changed while the build was running; run the build again")
