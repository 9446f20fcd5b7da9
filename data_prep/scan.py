"""First pass over the corpus: hash every text, and decide from hashes alone what goes where.

Duplicates, the validation split and the cut into shards are decided here, before anything is
tokenized: so each shard is a list of records, independent of every other shard, of the number of
workers, and of what was killed before. Reading twice costs little: tokenizing is 95 % of the work.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from data_prep.errors import PrepError
from data_prep.parallel import Tick, run_tasks
from data_prep.progress import Progress, say
from data_prep.readers import Malformed, read_documents
from data_prep.shards import write_atomic

_EXAMPLES = 5  # malformed records of a file that are quoted
_SPLIT_RESOLUTION = 1_000_000
_TICK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileScan:
    """What one file holds: per good record its number, hash [n, 2] uint64 and UTF-8 bytes."""

    records: np.ndarray
    hashes: np.ndarray
    sizes: np.ndarray
    malformed: int
    examples: list[str] = field(default_factory=list)
    """The first malformed records: "file:line: reason"."""


def text_hash(data: bytes) -> tuple[int, int]:
    """xxh3-128 of a text as two 64-bit halves (high, low)."""
    value = xxhash.xxh3_128_intdigest(data)
    return value >> 64, value & (1 << 64) - 1


def scan_file(task: tuple[Path, str], tick: Tick) -> FileScan:
    """Read one file; ``task`` is (path, text field)."""
    path, text_field = task
    records, hashes, sizes, examples = [], [], [], []
    malformed = unticked = 0
    for item in read_documents(path, text_field):
        if isinstance(item, Malformed):
            malformed += 1
            if len(examples) < _EXAMPLES:
                examples.append(f"{item.where}: {item.reason}")
            continue
        data = item.text.encode("utf-8", "surrogatepass")
        records.append(item.record)
        hashes.append(text_hash(data))
        sizes.append(len(data))
        unticked += len(data)
        if unticked >= _TICK_BYTES:
            tick(unticked)
            unticked = 0
    tick(unticked)
    return FileScan(
        np.array(records, np.int64),
        np.array(hashes, np.uint64).reshape(-1, 2),
        np.array(sizes, np.int64),
        malformed,
        examples,
    )


def file_stamp(path: Path) -> list:
    """What tells cheaply that a file is unchanged: path, size, modification time."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def scan_files(paths: list[Path], text_field: str, work: Path, workers: int) -> list[FileScan]:
    """Scan all files, keeping results under ``work`` so that a rerun reads unchanged files never.

    Raises:
        PrepError: a file cannot be read.
    """
    cached, todo = {}, []
    for path in paths:
        stored = _load_scan(_scan_path(path, text_field, work))
        if stored is None:
            todo.append(path)
        else:
            cached[path] = stored
    tasks = [(path, text_field) for path in todo]
    with Progress("scan", sum(path.stat().st_size for path in todo)) as progress:
        for number, scan in run_tasks(scan_file, tasks, workers, progress):
            cached[todo[number]] = scan
            _store_scan(_scan_path(todo[number], text_field, work), scan)
    return [cached[path] for path in paths]


def _scan_path(path: Path, text_field: str, work: Path) -> Path:
    key = xxhash.xxh3_128_hexdigest(repr([*file_stamp(path), text_field]).encode())
    return work / "scan" / f"{key}.npz"


def _store_scan(path: Path, scan: FileScan) -> None:
    buffer = io.BytesIO()
    examples = np.array([example.encode() for example in scan.examples], dtype=np.bytes_)
    np.savez(
        buffer,
        records=scan.records,
        hashes=scan.hashes,
        sizes=scan.sizes,
        malformed=scan.malformed,
        examples=examples,
    )
    write_atomic(path, buffer.getvalue())


def _load_scan(path: Path) -> FileScan | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            examples = [bytes(example).decode() for example in stored["examples"]]
            arrays = (stored[name] for name in ("records", "hashes", "sizes"))
            return FileScan(*arrays, int(stored["malformed"]), examples)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None  # absent, or left behind damaged: scan again


@dataclass(frozen=True)
class ShardPlan:
    """The records of one shard: per file (index into the file list) its records and hashes."""

    split: str
    number: int
    bytes_in: int
    parts: list[tuple[int, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class CorpusPlan:
    """All shards, and what was left out and why."""

    shards: list[ShardPlan]
    documents_read: int
    dropped: dict[str, int]
    digest: str
    """SHA-256 over the hashes of all documents in order: the identity of the corpus."""


def plan_shards(scans: list[FileScan], valid_fraction: float, shard_bytes: int) -> CorpusPlan:
    """Drop empty and repeated texts (the first in input order stays), split, and cut into shards.

    Args:
        scans: per file, in input order.
        valid_fraction: a text is for validation when its hash says so: the choice does not move
            when other documents come or go.
        shard_bytes: a shard holds about this much text.
    """
    hashes = np.concatenate([scan.hashes for scan in scans])
    sizes = np.concatenate([scan.sizes for scan in scans])
    records = np.concatenate([scan.records for scan in scans])
    files = np.repeat(np.arange(len(scans)), [len(scan.records) for scan in scans])

    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal texts stay in input order
    repeated = np.zeros(len(order), bool)
    repeated[order[1:]] = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
    empty = sizes == 0
    kept = ~repeated & ~empty

    valid = hashes[:, 1] % np.uint64(_SPLIT_RESOLUTION) < round(valid_fraction * _SPLIT_RESOLUTION)
    shards = []
    for split, mine in (("train", kept & ~valid), ("valid", kept & valid)):
        chosen = np.flatnonzero(mine)
        before = np.cumsum(sizes[chosen]) - sizes[chosen]
        _, number = np.unique(before // shard_bytes, return_inverse=True)
        for shard in range(int(number[-1]) + 1 if len(number) else 0):
            rows = chosen[number == shard]
            parts = [
                (int(file), records[rows[files[rows] == file]], hashes[rows[files[rows] == file]])
                for file in np.unique(files[rows])
            ]
            shards.append(ShardPlan(split, shard, int(sizes[rows].sum()), parts))
    return CorpusPlan(
        shards,
        documents_read=len(records),
        dropped={
            "duplicate": int((repeated & ~empty).sum()),
            "empty": int(empty.sum()),
            "malformed": sum(scan.malformed for scan in scans),
        },
        digest=hashlib.sha256(hashes.tobytes()).hexdigest(),
    )


def report_malformed(scans: list[FileScan], max_share: float) -> None:
    """Print the first malformed records of every file; refuse a corpus with too many.

    Raises:
        PrepError: more than ``max_share`` of the records are malformed, or none is good.
    """
    bad = sum(scan.malformed for scan in scans)
    good = sum(len(scan.records) for scan in scans)
    examples = [example for scan in scans for example in scan.examples]
    if not good and not bad:
        raise PrepError("--input: no document in these files")
    if bad > max_share * (good + bad):
        quoted = "; ".join(examples[:_EXAMPLES])
        raise PrepError(
            f"{bad} of {good + bad} records are malformed, more than --max-bad-share {max_share}: "
            f"{quoted}; repair them, set --text-field, or raise --max-bad-share"
        )
    for example in examples:
        say(f"malformed, skipped: {example}")
    if bad > len(examples):
        say(f"malformed, skipped: {bad - len(examples)} more")
