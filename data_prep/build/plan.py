"""From the scans alone: what is left out, what is for validation, and what goes into which shard.

All is decided before anything is tokenized, so each shard is independent of every other, of the
number of workers and jobs, and of what was killed before. Reading twice costs little: tokenizing is
95 % of the work. Memory does not grow with the corpus: hashes are compared bucket by bucket, and
the split assignment of each document (one byte: dropped, train or valid) lies in a file.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_prep.build.earlier import Earlier
from data_prep.build.planner import plan_once
from data_prep.build.repeated import BUCKET_ROWS, find_repeated
from data_prep.build.scan import FileScan, InputFile, check_rows, rule_verdict
from data_prep.build.stored_plan import (
    CorpusPlan,
    ShardPlan,
    assignments_file,
    load_plan,
    store_plan,
)
from data_prep.config import ALONE, BuildConfig, JobShare
from data_prep.sources.filters import KEPT, TextFilters
from xlstm_io.errors import PrepError
from xlstm_io.storage import temporary_path

SPLIT_RESOLUTION = 1_000_000
"""A text is for validation where its hash, modulo this, is below as large a share of it."""
_VERDICTS = 1 << 8  # values of SCAN_ROW's drop
DROPPED, TRAIN, VALID = 0, 1, 2  # split assignments
SPLITS = {"train": TRAIN, "valid": VALID}


@dataclass(frozen=True)
class Corpus:
    """The input files of a build with all that is decided about them.

    Attributes:
        files: in the order of the plan.
        fingerprints: of each file, see `files.file_fingerprint`.
        scans: of each file.
        plan: what goes into which shard.
        digest: see `corpus_digest`.
        earlier: the folder that the build extends, if any.
    """

    files: list[InputFile]
    fingerprints: list[list]
    scans: list[FileScan]
    plan: CorpusPlan
    digest: str
    earlier: Earlier | None


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
    earlier: Earlier | None,
    share: JobShare = ALONE,
) -> Corpus:
    """Decide from the scans what goes into which shard. Of several jobs one does so.

    Args:
        out: folder of the build.
        config: its configuration.
        files: the input files.
        fingerprints: of each file.
        scans: of each file.
        earlier: the folder that the build extends, if any: its documents are known, and the new
            shards count on.
        share: which of the jobs this is.
    """
    work = out / "_work"
    shard_bytes = max(1, int(config.shard_mb * 1e6))
    samples = {source.name: source.sample for source in config.all_sources()}
    plan = plan_corpus(
        files,
        scans,
        config.filters(),
        config.valid_fraction,
        shard_bytes,
        work,
        samples,
        earlier,
        share,
    )
    return Corpus(files, fingerprints, scans, plan, corpus_digest(files, scans), earlier)


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
    if config.extends:
        return  # the extended folder has both
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
    earlier: Earlier | None = None,
    share: JobShare = ALONE,
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
        earlier: see `plan_build`.
        share: see `plan_build`. Of several jobs none has checked the rows of the scans.

    Raises:
        PrepError: a scan is not what was written.
    """
    key = repr([corpus_digest(files, scans), valid_fraction, shard_bytes])
    if any(share < 1 for share in samples.values()):
        key += repr(samples)
    hashes, counts = np.empty((0, 2), np.uint64), dict[tuple[str, str], int]()
    if earlier is not None:
        hashes, counts = earlier.document_hashes(), earlier.shard_counts()
        key += repr(sorted(counts.items())) + xxhash.xxh3_128_hexdigest(hashes.data)
    path = work / "plan" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    total = sum(scan.documents for scan in scans)

    def make() -> CorpusPlan:
        if share.jobs > 1:
            check_rows(scans)
        file = assignments_file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(file)
        try:
            assignments = np.memmap(temporary, np.uint8, "w+", shape=(max(1, total),))
            read, dropped = _drop(files, scans, filters, samples, assignments, file.parent, hashes)
            shards = list(_cut(files, scans, valid_fraction, shard_bytes, assignments, counts))
            assignments.flush()
            del assignments
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
        plan = CorpusPlan(shards, read, dropped, str(file))
        store_plan(path, plan)
        return plan

    return plan_once(path, share, lambda: load_plan(path, files, scans), make)


def _drop(
    files: list[InputFile],
    scans: list[FileScan],
    filters: TextFilters,
    samples: dict[str, float],
    assignments: np.ndarray,
    scratch: Path,
    earlier: np.ndarray,
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
            limit = np.uint64(round(samples[file.source] * SPLIT_RESOLUTION))
            taken = rows["hash"][:, 0] % np.uint64(SPLIT_RESOLUTION) < limit
            unsampled[file.source] += int((kept & ~taken).sum())
            kept &= taken
        assignments[end - scan.documents : end] = kept
        read[file.source] += scan.documents
        malformed[file.source] += scan.malformed
        codes[file.source] += np.bincount(drop, minlength=_VERDICTS)

    by_file = np.zeros(len(files), np.int64)
    known = len(earlier)
    hashes = _kept_hashes(scans, ends, assignments, earlier)
    for numbers in find_repeated(hashes, known + int(ends[-1]), scratch):
        repeated = numbers[numbers >= known] - known
        assignments[repeated] = DROPPED
        # Of the files that the bucket touches alone: there may be thousands of both.
        owners, repeats = np.unique(np.searchsorted(ends, repeated, "right"), return_counts=True)
        by_file[owners] += repeats
    duplicates = dict.fromkeys(names, 0)
    for file, count in zip(files, by_file.tolist(), strict=True):
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
        chosen = filters.chosen
        dropped[name] = always | {reason: counts[reason] for reason in reasons if reason in chosen}
        dropped[name] |= by_rule | ({"sample": unsampled[name]} if samples[name] < 1 else {})
    return read, dropped


def _kept_hashes(
    scans: list[FileScan],
    ends: np.ndarray,
    assignments: np.ndarray,
    earlier: np.ndarray,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(numbers, hashes) of the documents of an extended folder, then of those not dropped here."""
    known = len(earlier)
    for first in range(0, known, BUCKET_ROWS):
        part = earlier[first : first + BUCKET_ROWS]
        yield np.arange(first, first + len(part)), part
    for scan, end in zip(scans, ends.tolist(), strict=True):
        kept = np.flatnonzero(assignments[end - scan.documents : end])
        yield known + kept + (end - scan.documents), scan.rows()["hash"][kept]


def _cut(
    files: list[InputFile],
    scans: list[FileScan],
    valid_fraction: float,
    shard_bytes: int,
    assignments: np.ndarray,
    shard_counts: dict[tuple[str, str], int],
) -> Iterator[ShardPlan]:
    """Mark validation texts in `assignments` and cut each source's splits into shards."""
    limit = np.uint64(round(valid_fraction * SPLIT_RESOLUTION))
    names = list(dict.fromkeys(file.source for file in files))
    cuts = {
        (name, split): _Cutter(name, split, shard_bytes, shard_counts.get((name, split), 0))
        for name in names
        for split in SPLITS
    }
    end = 0
    for number, (file, scan) in enumerate(zip(files, scans, strict=True)):
        rows = scan.rows()
        begin, end = end, end + scan.documents
        mine = assignments[begin:end]
        valid = rows["hash"][:, 1] % np.uint64(SPLIT_RESOLUTION) < limit
        mine[(mine != DROPPED) & valid] = VALID
        for split, assigned in SPLITS.items():
            chosen = np.flatnonzero(mine == assigned)
            cuts[file.source, split].add(number, chosen, rows["size"][chosen])
    for cutter in cuts.values():
        yield from cutter.shards


class _Cutter:
    """Collects the documents of one split of one source into shards."""

    def __init__(self, source: str, split: str, shard_bytes: int, first: int):
        self.source, self.split, self.shard_bytes = source, split, shard_bytes
        self._first = first  # number of its first shard
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
            documents, number = stop - start, self._first + len(self.shards)
            if place == self._place:  # goes on from the file before
                open_shard = self.shards.pop()
                number, parts = open_shard.number, open_shard.parts
                parts.append(part)
                documents += open_shard.documents
                size += open_shard.bytes_in
            self._place = place
            shard = ShardPlan(self.source, self.split, number, documents, size, parts)
            self.shards.append(shard)
