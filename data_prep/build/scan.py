"""First pass over the corpus: per text its hash, its size and the filters' verdict.

Results lie in `OUT/_work/scan`, one table a file; unchanged files are never read again. Jobs of an
array share the pass without waiting for each other: each starts with files of its own and then
takes those that are not finished yet. A file that two jobs scan at once comes out the same. Of what
the others have scanned they read the notes alone. Whichever of them makes the plan checks the rows.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.build.notes import read_note, write_note
from data_prep.config import JobShare
from data_prep.jobs.progress import Progress
from data_prep.jobs.workers import Tick, Workers
from data_prep.sources.documents import Document, Fields, text_hash
from data_prep.sources.files import file_fingerprint, file_size
from data_prep.sources.filters import TextFilters
from data_prep.sources.malformed import Tally
from data_prep.sources.readers import read_documents
from xlstm_io.errors import PrepError
from xlstm_io.foreign.json_file import StrictModel
from xlstm_io.shards.manifest import Count
from xlstm_io.storage import file_size as plain_file_size
from xlstm_io.storage import temporary_path

_CHUNK_ROWS = 1 << 14
_TICK_BYTES = 1 << 20
_LOGGED_IN_ALL = 100_000
"""Malformed records that are held and logged, over all files: a corpus may have millions."""

SCAN_ROW = np.dtype(
    [
        ("hash", "<u8", 2),  # xxh3-128 of the UTF-8 bytes: high, low
        ("size", "<i8"),  # UTF-8 bytes
        ("record", "<i8"),
        ("offset", "<i8"),  # see Document.offset
        ("drop", "u1"),  # TextFilters.judge, or rule_verdict
    ]
)


@dataclass(frozen=True)
class InputFile:
    """One file of a source, and how its documents are found."""

    path: str
    source: str
    fields: Fields


@dataclass(frozen=True)
class FileScan:
    """What one file holds; `rows()` has an entry per good record.

    Attributes:
        table: file of the rows.
        documents: good records.
        malformed: records that are not documents.
        examples: the first malformed records, as "file:line: reason".
        digest: xxh3-128 over the hashes and verdicts in order.
        stored_bytes: bytes of the good records in the file; 0 in scans of version 0.1.
        malformed_bytes: bytes of the malformed ones; likewise.
        rows_xxh3: xxh3-128 of the table; empty in scans of older versions.
    """

    table: str
    documents: int
    malformed: int
    examples: list[str]
    digest: str
    stored_bytes: int = 0
    malformed_bytes: int = 0
    rows_xxh3: str = ""

    def tally(self, path: str) -> Tally:
        """The counts of good and malformed records in the file `path`."""
        return Tally(
            path,
            self.documents,
            self.stored_bytes,
            self.malformed,
            self.malformed_bytes,
            self.examples,
        )

    def rows(self) -> np.ndarray:
        """SCAN_ROW per good record, mapped from disk."""
        if not self.documents:
            return np.empty(0, SCAN_ROW)
        return np.memmap(self.table, SCAN_ROW, "r", shape=(self.documents,))


class _ScanNote(StrictModel):
    """A stored `FileScan`."""

    documents: Count
    malformed: Count
    examples: list[str]
    digest: str
    stored_bytes: Count = 0
    malformed_bytes: Count = 0
    rows_xxh3: str = ""


@dataclass(frozen=True)
class ScanTask:
    """All that a worker needs to scan one file.

    Attributes:
        file: the file.
        filters: the rules for leaving texts out.
        path: where the scan is stored, see `scan_path`.
        reads_rows: whether the rows of a stored scan are checked.
    """

    file: InputFile
    filters: TextFilters
    path: Path
    reads_rows: bool = True


def scan_file(task: ScanTask, tick: Tick) -> FileScan:
    """Read one file and store what it holds, unless another job did so meanwhile."""
    stored = load_scan(task.path, _LOGGED_IN_ALL, task.reads_rows)
    if stored is not None:
        return stored
    table = task.path.with_suffix(".scan")
    table.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(table)
    digest, whole = xxhash.xxh3_128(), xxhash.xxh3_128()
    tally = Tally(task.file.path)
    held: list[tuple] = []  # rows that are not written yet
    unticked = 0
    try:
        with open(temporary, "wb") as file:

            def flush() -> None:
                rows = np.array(held, SCAN_ROW)
                _update(digest, rows)
                whole.update(rows.tobytes())
                file.write(rows.tobytes())
                held.clear()

            for item in tally.documents(read_documents(task.file.path, task.file.fields)):
                data = item.text.encode("utf-8")
                verdict = _judge(task.filters, task.file, item)
                digest_of = text_hash(item.identity(data))
                held.append((digest_of, len(data), item.record, item.offset, verdict))
                if len(held) >= _CHUNK_ROWS:
                    flush()
                unticked += len(data)
                if unticked >= _TICK_BYTES:
                    tick(unticked)
                    unticked = 0
            flush()
        temporary.replace(table)
    finally:
        temporary.unlink(missing_ok=True)
    tick(unticked)
    scan = FileScan(
        str(table),
        tally.good,
        tally.bad,
        tally.examples,
        digest.hexdigest(),
        tally.good_bytes,
        tally.bad_bytes,
        whole.hexdigest(),
    )
    fields = {key: value for key, value in asdict(scan).items() if key != "table"}
    write_note(task.path, fields, sync=False)
    return scan


def _update(digest: xxhash.xxh3_128, rows: np.ndarray) -> None:
    digest.update(np.ascontiguousarray(rows["hash"]).data)
    digest.update(np.ascontiguousarray(rows["drop"]).data)


def _judge(filters: TextFilters, file: InputFile, document: Document) -> int:
    for number, (rule, value) in enumerate(zip(file.fields.keep, document.values, strict=True)):
        if not rule.keeps(value):
            return rule_verdict(number)
    try:
        return filters.judge(document.text)
    except Exception as error:
        if not filters.functions:
            raise
        raise PrepError(
            f"a function of --filter-functions failed on {file.path}, record "
            f"{document.record + 1}: {type(error).__name__}: {error}"
        ) from error


def rule_verdict(number: int) -> int:
    """The verdict of the rule `number` of `Fields.keep`; the filters' count from the other end."""
    return int(np.iinfo(np.uint8).max) - number


def load_scan(path: Path, examples: int = 0, reads_rows: bool = True) -> FileScan | None:
    """The scan stored at `path`; None where it is absent or not what was written.

    Args:
        path: the note.
        examples: most of the malformed records that are kept in memory.
        reads_rows: whether the rows are read and checked, or the size of their file alone.
    """
    table = path.with_suffix(".scan")
    note = read_note(_ScanNote, path)
    if note is None:
        return None
    scan = FileScan(str(table), **{**note.model_dump(), "examples": note.examples[:examples]})
    try:
        if plain_file_size(table) != scan.documents * SCAN_ROW.itemsize:
            return None
    except OSError:
        return None
    return scan if not reads_rows or _is_intact(scan) else None


def check_rows(scans: list[FileScan]) -> None:
    """Read the rows of all scans.

    Raises:
        PrepError: they are not what was written. The next run scans that file again.
    """
    for scan in scans:
        try:
            intact = _is_intact(scan)
        except FileNotFoundError:  # another job has found the damage
            intact = False
        if not intact:
            Path(scan.table).unlink(missing_ok=True)
            raise PrepError(f"{scan.table} was damaged, and is removed; run the build again")


def _is_intact(scan: FileScan) -> bool:
    """Whether the rows of a scan are what was written."""
    digest, whole, rows = xxhash.xxh3_128(), xxhash.xxh3_128(), scan.rows()
    for first in range(0, len(rows), _CHUNK_ROWS):
        part = rows[first : first + _CHUNK_ROWS]
        _update(digest, part)
        whole.update(part.tobytes())
        ascending = (np.diff(part["record"]) > 0).all() and (part["record"] >= 0).all()
        if not ascending or (part["offset"] < 0).any() or (part["size"] < 0).any():
            return False
    return digest.hexdigest() == scan.digest and scan.rows_xxh3 in ("", whole.hexdigest())


def scan_path(file: InputFile, fingerprint: list, filters: dict[str, Any], work: Path) -> Path:
    """Where the scan of a file is stored: the name depends on all that the scan depends on.

    Args:
        file: the input file.
        fingerprint: of it.
        filters: `TextFilters.settings()`.
        work: `OUT/_work`.
    """
    key = repr([fingerprint, file.fields, filters])
    if file.fields.keep:
        key += repr(file.fields.keep)
    if file.fields.labelled:
        key += repr((file.fields.prompt, file.fields.completion, file.fields.segments))
    return work / "scan" / f"{xxhash.xxh3_128_hexdigest(key.encode())}.json"


def scan_files(
    files: list[InputFile],
    filters: TextFilters,
    work: Path,
    workers: Workers,
    share: JobShare,
) -> list[FileScan]:
    """Scan all files, beginning with this job's.

    Args:
        files: the input files.
        filters: the rules for leaving texts out.
        work: `OUT/_work`.
        workers: processes to use.
        share: which of the jobs this is.

    Returns:
        The scan of each file.

    Raises:
        PrepError: a file cannot be read.
    """
    chosen = filters.settings()
    paths = [scan_path(file, file_fingerprint(file.path), chosen, work) for file in files]
    most, alone = max(1, _LOGGED_IN_ALL // max(1, len(files))), share.jobs == 1
    scans: dict[int, FileScan] = {}
    for number, path in enumerate(paths):
        stored = load_scan(path, most, alone)
        if stored is not None:
            scans[number] = stored
    todo = [n for n in _order(len(files), share) if n not in scans]
    with Progress("scan", sum(file_size(files[n].path) for n in todo)) as progress:
        tasks = [ScanTask(files[n], filters, paths[n], alone) for n in todo]
        for place, scan in workers.run(scan_file, tasks, progress):
            scans[todo[place]] = replace(scan, examples=scan.examples[:most])
    return [scans[number] for number in range(len(files))]


def _order(count: int, share: JobShare) -> list[int]:
    """Own files first; then the others', backwards and beginning at another place in each job."""
    others = [number for number in range(count - 1, -1, -1) if number % share.jobs != share.job]
    turn = len(others) * share.job // share.jobs
    return [*range(share.job, count, share.jobs), *others[turn:], *others[:turn]]
