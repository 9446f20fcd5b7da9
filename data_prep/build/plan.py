"""From the scans alone: what is left out, what is for validation, and what goes into which shard.

All is decided before anything is tokenized, so each shard is independent of every other, of the
number of workers and jobs, and of what was killed before. Reading twice costs little: tokenizing is
95 % of the work. Memory does not grow with the corpus: hashes are compared bucket by bucket, and
the fate of each document (one byte) lies in a file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_prep.build.scan import FileScan, InputFile
from data_prep.sources.filters import KEPT, TextFilters
from xlstm_io.storage import temporary_path, write_atomic

_SPLIT_RESOLUTION = 1_000_000
_BUCKET_ROWS = 1 << 20
_MAX_BUCKETS = 1 << 10
DROPPED, TRAIN, VALID = 0, 1, 2  # fates
SPLITS = {"train": TRAIN, "valid": VALID}


@dataclass(frozen=True)
class ShardPlan:
    """One shard: of each file, the rows of its scan from ``first`` up to ``last``.

    Among them are the shard's documents, those whose fate is the split.
    """

    source: str
    split: str
    number: int
    documents: int
    bytes_in: int
    parts: list[tuple[int, int, int]]
    """(index into the files, first, last)."""


@dataclass(frozen=True)
class CorpusPlan:
    """All shards, and what was left out and why."""

    shards: list[ShardPlan]
    documents_read: dict[str, int]
    """By source."""
    dropped: dict[str, dict[str, int]]
    """By source and reason."""
    fate: str
    """File of one byte per document, file after file."""


@dataclass(frozen=True)
class Corpus:
    """The input files of a build with all that is decided about them."""

    files: list[InputFile]
    stamps: list[list]
    scans: list[FileScan]
    plan: CorpusPlan
    digest: str


def corpus_digest(files: list[InputFile], scans: list[FileScan]) -> str:
    """SHA-256 over the texts in order and the sources they belong to: the corpus' identity."""
    parts = [[file.source, scan.digest] for file, scan in zip(files, scans, strict=True)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def plan_corpus(
    files: list[InputFile],
    scans: list[FileScan],
    filters: TextFilters,
    valid_fraction: float,
    shard_bytes: int,
    work: Path,
) -> CorpusPlan:
    """Drop what filters say and repeated texts (the first in input order stays); split; cut.

    The plan is stored under ``work``; a stored one of the same corpus and settings is used.

    Args:
        files: in input order, source after source.
        scans: one for each of the files.
        filters: whose verdicts the scans hold.
        valid_fraction: a text is for validation when its hash says so: the choice does not move
            when other documents come or go.
        shard_bytes: a shard holds about this much text.
        work: the build's folder of notes.
    """
    key = repr([corpus_digest(files, scans), valid_fraction, shard_bytes])
    note = work / "plan" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    fate = note.with_suffix(".fate")
    total = sum(scan.documents for scan in scans)
    stored = _load(note, total)
    if stored is not None:
        return stored
    fate.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(fate)
    try:
        fates = np.memmap(temporary, np.uint8, "w+", shape=(max(1, total),))
        plan = _decide(files, scans, filters, valid_fraction, shard_bytes, fates, str(fate))
        fates.flush()
        del fates
        temporary.replace(fate)
    finally:
        temporary.unlink(missing_ok=True)
    fields = {key: value for key, value in asdict(plan).items() if key != "fate"}
    write_atomic(note, json.dumps(fields).encode() + b"\n")
    return plan


def _load(note: Path, total: int) -> CorpusPlan | None:
    fate = note.with_suffix(".fate")
    try:
        if fate.stat().st_size != max(1, total):
            return None
        fields = json.loads(note.read_bytes())
        shards = [ShardPlan(**shard) for shard in fields.pop("shards")]
        return CorpusPlan(shards, **fields, fate=str(fate))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _decide(files, scans, filters, valid_fraction, shard_bytes, fates, fate) -> CorpusPlan:
    names = list(dict.fromkeys(file.source for file in files))
    reasons = filters.reasons
    read = dict.fromkeys(names, 0)
    codes = {name: np.zeros(len(reasons), np.int64) for name in names}
    malformed = dict.fromkeys(names, 0)
    ends = np.cumsum([scan.documents for scan in scans])
    for file, scan, end in zip(files, scans, ends.tolist(), strict=True):
        drop = scan.rows()["drop"]
        fates[end - scan.documents : end] = drop == KEPT
        read[file.source] += scan.documents
        malformed[file.source] += scan.malformed
        codes[file.source] += np.bincount(drop, minlength=len(reasons))

    duplicates = dict.fromkeys(names, 0)
    for repeated in find_repeated(_kept_hashes(scans, ends), int(ends[-1]), Path(fate).parent):
        fates[repeated] = DROPPED
        owners = np.bincount(np.searchsorted(ends, repeated, side="right"), minlength=len(files))
        for file, count in zip(files, owners.tolist(), strict=True):
            duplicates[file.source] += count

    shards = list(_cut(files, scans, ends, valid_fraction, shard_bytes, fates))
    dropped = {}
    for name in names:
        counts = dict(zip(reasons, codes[name].tolist(), strict=True))
        always = {
            "duplicate": duplicates[name],
            "empty": counts["empty"],
            "malformed": malformed[name],
        }
        chosen = filters.settings()
        dropped[name] = always | {reason: counts[reason] for reason in reasons if reason in chosen}
    return CorpusPlan(shards, read, dropped, fate)


def _kept_hashes(scans, ends) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for scan, end in zip(scans, ends.tolist(), strict=True):
        rows = scan.rows()
        kept = np.flatnonzero(rows["drop"] == KEPT)
        yield kept + (end - scan.documents), rows["hash"][kept]


def find_repeated(
    parts: Iterable[tuple[np.ndarray, np.ndarray]], total: int, scratch: Path
) -> Iterator[np.ndarray]:
    """Numbers of the texts whose hash a text of a smaller number has.

    Args:
        parts: (numbers [n], hashes uint64 [n, 2]), numbers ascending over all parts.
        total: about how many texts there are.
        scratch: folder for the buckets of a large corpus: texts are first spread over files by
            their hash, then each file is sorted on its own.
    """
    buckets = min(_MAX_BUCKETS, 1 << max(0, total // _BUCKET_ROWS).bit_length())
    if buckets == 1:
        held = [_table(*part) for part in parts]
        yield _repeated_in(np.concatenate(held) if held else np.empty((0, 3), np.uint64))
        return
    folder = temporary_path(scratch / "buckets")
    folder.mkdir(parents=True)
    shift = np.uint64(64 - (buckets.bit_length() - 1))
    try:
        for part in parts:
            table = _table(*part)
            bucket = (table[:, 0] >> shift).astype(np.int64)
            order = np.argsort(bucket, kind="stable")
            table, bucket = table[order], bucket[order]
            present, first = np.unique(bucket, return_index=True)
            for number, rows in zip(present, np.split(table, first[1:]), strict=True):
                with open(folder / str(number), "ab") as file:
                    file.write(rows.tobytes())
        for path in folder.iterdir():
            yield _repeated_in(np.fromfile(path, np.uint64).reshape(-1, 3))
    finally:
        shutil.rmtree(folder)


def _table(numbers: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    return np.column_stack([hashes, numbers.astype(np.uint64)])


def _repeated_in(table: np.ndarray) -> np.ndarray:
    table = table[np.lexsort((table[:, 1], table[:, 0]))]  # stable: equal texts stay in order
    repeated = (table[1:, :2] == table[:-1, :2]).all(axis=1)
    return np.sort(table[1:, 2][repeated]).astype(np.int64)


def _cut(files, scans, ends, valid_fraction, shard_bytes, fates) -> Iterator[ShardPlan]:
    """Mark validation texts in ``fates`` and cut each source's splits into shards."""
    limit = np.uint64(round(valid_fraction * _SPLIT_RESOLUTION))
    names = list(dict.fromkeys(file.source for file in files))
    cuts = {(name, split): _Cutter(name, split, shard_bytes) for name in names for split in SPLITS}
    for number, (file, scan, end) in enumerate(zip(files, scans, ends.tolist(), strict=True)):
        rows = scan.rows()
        mine = fates[end - scan.documents : end]
        valid = rows["hash"][:, 1] % np.uint64(_SPLIT_RESOLUTION) < limit
        mine[(mine != DROPPED) & valid] = VALID
        for split, fate in SPLITS.items():
            chosen = np.flatnonzero(mine == fate)
            cuts[file.source, split].add(number, chosen, rows["size"][chosen])
    for cutter in cuts.values():
        yield from cutter.shards


class _Cutter:
    """Collects the documents of one split of one source into shards."""

    def __init__(self, source: str, split: str, shard_bytes: int):
        self.source, self.split, self.shard_bytes = source, split, shard_bytes
        self.shards: list[ShardPlan] = []
        self._total = 0
        self._place = -1  # of the last shard, in units of shard_bytes

    def add(self, file: int, chosen: np.ndarray, sizes: np.ndarray) -> None:
        """The documents ``chosen`` of a file, with their sizes."""
        if not len(chosen):
            return
        before = self._total + np.cumsum(sizes) - sizes
        self._total += int(sizes.sum())
        places = before // self.shard_bytes
        present, first = np.unique(places, return_index=True)
        bounds = [*first.tolist(), len(chosen)]
        for place, start, stop in zip(present.tolist(), bounds[:-1], bounds[1:], strict=True):
            part = (file, int(chosen[start]), int(chosen[stop - 1]) + 1)
            size, parts = int(sizes[start:stop].sum()), [part]
            documents, number = stop - start, len(self.shards)
            if place == self._place:  # goes on from the file before
                open_shard = self.shards.pop()
                number, parts = open_shard.number, open_shard.parts
                parts.append(part)
                documents += open_shard.documents
                size += open_shard.bytes_in
            self._place = place
            shard = ShardPlan(self.source, self.split, number, documents, size, parts)
            self.shards.append(shard)
