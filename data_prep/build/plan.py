"""From the scans alone: what is left out, what is for validation, and what goes into which shard.

All is decided before anything is tokenized, so each shard is independent of every other, of the
number of workers and jobs, and of what was killed before. Reading twice costs little: tokenizing is
95 % of the work. Memory does not grow with the corpus: hashes are compared bucket by bucket, and
the split assignment of each document (one byte: dropped, train or valid) lies in a file.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_prep.build.scan import FileScan, InputFile, rule_verdict
from data_prep.config import BuildConfig
from data_prep.sources.filters import KEPT, TextFilters
from xlstm_io.errors import PrepError
from xlstm_io.storage import temporary_path, write_atomic

_SPLIT_RESOLUTION = 1_000_000
_BUCKET_ROWS = 1 << 20
_MAX_BUCKETS = 1 << 10
_VERDICTS = 1 << 8  # values of SCAN_ROW's drop
DROPPED, TRAIN, VALID = 0, 1, 2  # split assignments
SPLITS = {"train": TRAIN, "valid": VALID}


@dataclass(frozen=True)
class ShardPlan:
    """One shard: of each file, the rows of its scan from `first` up to `last`.

    Among them are the shard's documents: those that are assigned to its split.

    Attributes:
        source: name of the source.
        split: "train" or "valid".
        number: from 0, within source and split.
        documents: how many it holds.
        bytes_in: UTF-8 bytes of their texts.
        parts: (index into the files, first, last) of each file.
    """

    source: str
    split: str
    number: int
    documents: int
    bytes_in: int
    parts: list[tuple[int, int, int]]


@dataclass(frozen=True)
class CorpusPlan:
    """All shards, and what was left out and why.

    Attributes:
        shards: source after source, train before valid.
        documents_read: by source.
        dropped: documents that were left out, by source and reason.
        assignments: file with the split assignment of each document, file after file.
    """

    shards: list[ShardPlan]
    documents_read: dict[str, int]
    dropped: dict[str, dict[str, int]]
    assignments: str


@dataclass(frozen=True)
class Corpus:
    """The input files of a build with all that is decided about them.

    Attributes:
        files: in the order of the plan.
        fingerprints: of each file, see `files.file_fingerprint`.
        scans: of each file.
        plan: what goes into which shard.
        digest: see `corpus_digest`.
    """

    files: list[InputFile]
    fingerprints: list[list]
    scans: list[FileScan]
    plan: CorpusPlan
    digest: str


def corpus_digest(files: list[InputFile], scans: list[FileScan]) -> str:
    """SHA-256 over the texts in order and the sources they belong to: it identifies the corpus."""
    parts = [[file.source, scan.digest] for file, scan in zip(files, scans, strict=True)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def plan_build(
    out: Path,
    config: BuildConfig,
    files: list[InputFile],
    fingerprints: list[list],
    scans: list[FileScan],
) -> Corpus:
    """Decide from the scans what goes into which shard.

    Args:
        out: folder of the build.
        config: its configuration.
        files: the input files.
        fingerprints: of each file.
        scans: of each file.
    """
    work = out / "_work"
    shard_bytes = max(1, int(config.shard_mb * 1e6))
    samples = {source.name: source.sample for source in config.all_sources()}
    plan = plan_corpus(
        files, scans, config.filters(), config.valid_fraction, shard_bytes, work, samples
    )
    return Corpus(files, fingerprints, scans, plan, corpus_digest(files, scans))


def check_splits(plan: CorpusPlan, config: BuildConfig) -> None:
    """Check that there are documents to train on, and to validate on where that is asked for.

    Raises:
        PrepError: there are none.
    """
    kept = {"train": 0, "valid": 0}
    for shard in plan.shards:
        kept[shard.split] += shard.documents
    total = sum(kept.values())
    if total == 0:
        counts: dict[str, int] = {}
        for dropped in plan.dropped.values():
            for reason, count in dropped.items():
                counts[reason] = counts.get(reason, 0) + count
        why = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
        raise PrepError(f"--input: no document is left ({why}); look at the filters and the field")
    more = "give more documents (--text-split makes many of one large text file)"
    if config.valid_fraction > 0 and kept["valid"] == 0:
        raise PrepError(
            f"none of the {total} documents fell into validation with --valid-fraction "
            f"{config.valid_fraction}; raise it, {more}, or set it to 0"
        )
    if kept["train"] == 0:
        raise PrepError(
            f"all {total} documents fell into validation with --valid-fraction "
            f"{config.valid_fraction}; lower it, or {more}"
        )


def plan_corpus(
    files: list[InputFile],
    scans: list[FileScan],
    filters: TextFilters,
    valid_fraction: float,
    shard_bytes: int,
    work: Path,
    samples: dict[str, float],
) -> CorpusPlan:
    """Drop what filters say and repeated texts, choose the splits, and cut them into shards.

    Of equal texts the first in input order stays. The plan is stored under `work`; a stored one of
    the same corpus and settings is used.

    Args:
        files: in input order, source after source.
        scans: of each file.
        filters: whose verdicts the scans hold.
        valid_fraction: a text is for validation when its hash says so: the choice does not move
            when other documents come or go.
        shard_bytes: a shard holds about this much text.
        work: `OUT/_work`.
        samples: by source, the share of its documents that is taken.
    """
    key = repr([corpus_digest(files, scans), valid_fraction, shard_bytes])
    if any(share < 1 for share in samples.values()):
        key += repr(samples)
    path = work / "plan" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    total = sum(scan.documents for scan in scans)
    stored = _load(path, total)
    if stored is not None:
        return stored
    file = _assignments_file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(file)
    try:
        assignments = np.memmap(temporary, np.uint8, "w+", shape=(max(1, total),))
        read, dropped = _drop(files, scans, filters, samples, assignments, file.parent)
        shards = list(_cut(files, scans, valid_fraction, shard_bytes, assignments))
        assignments.flush()
        del assignments
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    plan = CorpusPlan(shards, read, dropped, str(file))
    fields = {key: value for key, value in asdict(plan).items() if key != "assignments"}
    write_atomic(path, json.dumps(fields).encode() + b"\n")
    return plan


def _assignments_file(path: Path) -> Path:
    """The file of split assignments that belongs to the stored plan `path`."""
    return path.with_suffix(".fate")


def _load(path: Path, total: int) -> CorpusPlan | None:
    file = _assignments_file(path)
    try:
        if file.stat().st_size != max(1, total):
            return None
        fields = json.loads(path.read_bytes())
        shards = [ShardPlan(**shard) for shard in fields.pop("shards")]
        return CorpusPlan(shards, **fields, assignments=str(file))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _drop(
    files: list[InputFile],
    scans: list[FileScan],
    filters: TextFilters,
    samples: dict[str, float],
    assignments: np.ndarray,
    scratch: Path,
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Mark in `assignments` which documents are dropped (0) and which are kept (1, TRAIN).

    Returns:
        Documents read by source, and documents dropped by source and reason.
    """
    names = list(dict.fromkeys(file.source for file in files))
    reasons = filters.reasons
    read = dict.fromkeys(names, 0)
    codes = {name: np.zeros(_VERDICTS, np.int64) for name in names}
    malformed = dict.fromkeys(names, 0)
    unsampled = dict.fromkeys(names, 0)
    ends = np.cumsum([scan.documents for scan in scans])
    for file, scan, end in zip(files, scans, ends.tolist(), strict=True):
        rows = scan.rows()
        drop, kept = rows["drop"], rows["drop"] == KEPT
        if samples[file.source] < 1:
            # The half of the hash that does not choose the split.
            limit = np.uint64(round(samples[file.source] * _SPLIT_RESOLUTION))
            taken = rows["hash"][:, 0] % np.uint64(_SPLIT_RESOLUTION) < limit
            unsampled[file.source] += int((kept & ~taken).sum())
            kept &= taken
        assignments[end - scan.documents : end] = kept
        read[file.source] += scan.documents
        malformed[file.source] += scan.malformed
        codes[file.source] += np.bincount(drop, minlength=_VERDICTS)

    duplicates = dict.fromkeys(names, 0)
    for repeated in find_repeated(_kept_hashes(scans, ends, assignments), int(ends[-1]), scratch):
        assignments[repeated] = DROPPED
        owners = np.bincount(np.searchsorted(ends, repeated, side="right"), minlength=len(files))
        for file, count in zip(files, owners.tolist(), strict=True):
            duplicates[file.source] += count

    dropped = {}
    for name in names:
        verdicts = codes[name].tolist()
        counts = dict(zip(reasons, verdicts, strict=False))
        rules = next(file.fields.keep for file in files if file.source == name)
        by_rule = {f"keep {r.field}": verdicts[rule_verdict(n)] for n, r in enumerate(rules)}
        always = {
            "duplicate": duplicates[name],
            "empty": counts["empty"],
            "malformed": malformed[name],
        }
        chosen = filters.settings()
        dropped[name] = always | {reason: counts[reason] for reason in reasons if reason in chosen}
        dropped[name] |= by_rule | ({"sample": unsampled[name]} if samples[name] < 1 else {})
    return read, dropped


def _kept_hashes(
    scans: list[FileScan], ends: np.ndarray, assignments: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for scan, end in zip(scans, ends.tolist(), strict=True):
        kept = np.flatnonzero(assignments[end - scan.documents : end])
        yield kept + (end - scan.documents), scan.rows()["hash"][kept]


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


def _cut(
    files: list[InputFile],
    scans: list[FileScan],
    valid_fraction: float,
    shard_bytes: int,
    assignments: np.ndarray,
) -> Iterator[ShardPlan]:
    """Mark validation texts in `assignments` and cut each source's splits into shards."""
    limit = np.uint64(round(valid_fraction * _SPLIT_RESOLUTION))
    names = list(dict.fromkeys(file.source for file in files))
    cuts = {(name, split): _Cutter(name, split, shard_bytes) for name in names for split in SPLITS}
    end = 0
    for number, (file, scan) in enumerate(zip(files, scans, strict=True)):
        rows = scan.rows()
        begin, end = end, end + scan.documents
        mine = assignments[begin:end]
        valid = rows["hash"][:, 1] % np.uint64(_SPLIT_RESOLUTION) < limit
        mine[(mine != DROPPED) & valid] = VALID
        for split, assigned in SPLITS.items():
            chosen = np.flatnonzero(mine == assigned)
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
        """The documents `chosen` of a file, with their sizes."""
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
