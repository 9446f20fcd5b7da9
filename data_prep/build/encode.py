"""Second pass: one planned shard becomes tokens, rows and a tar. Each shard stands alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from data_prep.build.notes import read_note, write_note
from data_prep.build.pack import Packing, as_stored, make_packer, with_labels, write_shard
from data_prep.build.plan import SPLITS, Corpus
from data_prep.build.scan import FileScan, InputFile
from data_prep.build.stored_plan import ShardPlan
from data_prep.config import BuildConfig
from data_prep.jobs.workers import Tick
from data_prep.sources.documents import Document, Part, text_hash
from data_prep.sources.readers import read_documents
from xlstm_io.errors import PrepError
from xlstm_io.foreign.json_file import StrictModel
from xlstm_io.shards.manifest import Count, ShardEntry
from xlstm_io.shards.rows import token_dtype
from xlstm_io.shards.shard import entry_is_there, index_path
from xlstm_io.tokenizer import Tokenizer, open_tokenizer

_BATCH_BYTES = 1 << 18
BINS_PER_OCTAVE = 4  # of the histogram of lengths
_BINS = 40 * BINS_PER_OCTAVE
_ROUND_TRIPS = 32  # documents of each shard that are decoded again and compared


@dataclass(frozen=True)
class ShardPart:
    """The rows `first` to `last` of one file's scan.

    Attributes:
        file: the input file.
        scan: its scan.
        offset: where the file begins in the split assignments.
        first: first row.
        last: last row, not included.
    """

    file: InputFile
    scan: FileScan
    offset: int
    first: int
    last: int


@dataclass(frozen=True)
class EncodeTask:
    """All that a worker needs for one shard.

    Attributes:
        plan: the shard.
        parts: where its documents are.
        assignments: file of the split assignments of all documents.
        tokenizer: path of the tokenizer.
        tokenizer_sha256: hash of its file.
        out: folder of the build.
        seq_len: context length.
        packing: "concat" or "best_fit".
        labels: whether the build has labels.
    """

    plan: ShardPlan
    parts: list[ShardPart]
    assignments: str
    tokenizer: str
    tokenizer_sha256: str
    out: Path
    seq_len: int
    packing: Packing
    labels: bool


class ShardRecord(StrictModel):
    """A finished shard: its manifest entry, and figures for the report.

    Attributes:
        entry: for the manifest.
        histogram: documents by floor(BINS_PER_OCTAVE * log2(tokens)).
        round_trips: documents that were decoded again and compared.
        lossy: those of them that came back changed.
    """

    entry: ShardEntry
    histogram: Annotated[list[Count], Field(min_length=_BINS, max_length=_BINS)]
    round_trips: Count
    lossy: Count


def shard_path(plan: ShardPlan) -> str:
    """`<source>/<split>/shard-00000042.tar`, relative to the folder of the build."""
    return f"{plan.source}/{plan.split}/shard-{plan.number:08d}.tar"


def record_path(out: Path, plan: ShardPlan) -> Path:
    """Where the build state keeps the record of a finished shard."""
    return out / "_work" / "done" / f"{plan.source}-{plan.split}-{plan.number:08d}.json"


def load_record(out: Path, plan: ShardPlan) -> ShardRecord | None:
    """The record of a finished shard; None unless its files are there with the recorded size.

    Raises:
        ShardFormatError: a link leads out of the folder.
    """
    record = read_note(ShardRecord, record_path(out, plan))
    if record is None:
        return None
    entry = record.entry
    expected = (shard_path(plan), index_path(Path(shard_path(plan))).as_posix())
    ours = (entry.path, entry.index) == expected and entry.docs == plan.documents
    ours = ours and entry.docs == sum(record.histogram) and entry.bytes_in == plan.bytes_in
    return record if ours and entry_is_there(out, entry) else None


def encode_tasks(
    out: Path, config: BuildConfig, tokenizer: Tokenizer, corpus: Corpus, shards: list[ShardPlan]
) -> list[EncodeTask]:
    """The tasks of some shards of a build."""
    ends = np.cumsum([scan.documents for scan in corpus.scans]).tolist()
    begins = [0, *ends[:-1]]
    return [
        EncodeTask(
            plan=shard,
            parts=[
                ShardPart(corpus.files[n], corpus.scans[n], begins[n], first, last)
                for n, first, last in shard.parts
            ],
            assignments=corpus.plan.assignments,
            tokenizer=str(tokenizer.path),
            tokenizer_sha256=tokenizer.sha256,
            out=out,
            seq_len=config.seq_len,
            packing=config.packing,
            labels=config.labels,
        )
        for shard in shards
    ]


def encode_shard(task: EncodeTask, tick: Tick) -> ShardRecord:
    """Tokenize, pack and write one shard, then record it in the build state.

    Raises:
        PrepError: an input file or the tokenizer changed.
        Interrupted: the build was asked to stop.
    """
    tokenizer = tokenizer_of_worker(task.tokenizer, task.tokenizer_sha256)
    ids = tokenizer.document_ids()
    dtype = token_dtype(tokenizer.vocab_size)
    histogram = np.zeros(_BINS, np.int64)
    checked = lossy = 0

    def documents() -> Iterator[np.ndarray]:
        nonlocal checked, lossy
        for batch, size in _batches(task):
            texts = [document.text for document in batch]
            if task.labels:
                encoded, learnt = _encode_parts(tokenizer, batch)
            else:
                encoded, learnt = tokenizer.encode(texts), []
            if checked < _ROUND_TRIPS:
                lossy += _count_lossy(tokenizer, texts, encoded, _ROUND_TRIPS - checked)
                checked = min(_ROUND_TRIPS, checked + len(texts))
            lengths = np.array([len(document) + 2 for document in encoded])
            bins = (BINS_PER_OCTAVE * np.log2(lengths)).astype(np.int64)
            histogram[:] += np.bincount(bins, minlength=_BINS)
            stored = (as_stored(document, ids.bos, ids.eos, dtype) for document in encoded)
            yield from map(with_labels, stored, learnt) if task.labels else stored
            tick(size)

    packer = make_packer(task.packing, task.seq_len, dtype, ids.pad, task.labels)
    entry = write_shard(
        task.out, shard_path(task.plan), documents(), packer, bytes_in=task.plan.bytes_in
    )
    record = ShardRecord(
        entry=entry, histogram=histogram.tolist(), round_trips=checked, lossy=lossy
    )
    write_note(record_path(task.out, task.plan), record.model_dump())
    return record


def _encode_parts(
    tokenizer: Tokenizer, documents: list[Document]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids of each document, part by part, and which tokens of the stored document are learnt.

    A part is encoded by itself, as a prompt is when a model continues it. The eos belongs to the
    last part. A text without parts is learnt as a whole.
    """
    parts = [document.parts or (Part(document.text, True),) for document in documents]
    encoded = iter(tokenizer.encode([part.text for each in parts for part in each]))
    ids, learnt = [], []
    for each in parts:
        own = [next(encoded) for _ in each]
        ids.append(np.concatenate(own))
        flags = [part.learnt for part in each]
        counts = [len(piece) for piece in own]
        learnt.append(np.concatenate([[False], np.repeat(flags, counts), flags[-1:]]))
    return ids, learnt


@lru_cache(maxsize=1)
def tokenizer_of_worker(path: str, sha256: str) -> Tokenizer:
    """The tokenizer of a worker process, opened once; `sha256` makes a changed file a miss.

    Raises:
        PrepError: it is another one by now.
    """
    tokenizer = open_tokenizer(path)
    if tokenizer.sha256 != sha256:
        raise PrepError(f"--tokenizer {path}: changed while the build was running; run it again")
    return tokenizer


def _count_lossy(
    tokenizer: Tokenizer, texts: list[str], encoded: list[np.ndarray], limit: int
) -> int:
    """How many of the first `limit` texts do not come back from their ids."""
    pairs = list(zip(texts, encoded, strict=True))[:limit]
    return sum(tokenizer.decode(ids) != text for text, ids in pairs)


def _batches(task: EncodeTask) -> Iterator[tuple[list[Document], int]]:
    """The shard's documents in order, in batches of about 256 KB; each with its UTF-8 bytes.

    Raises:
        PrepError: a file no longer holds what the scan saw.
    """
    documents: list[Document] = []
    size = 0
    for part in task.parts:
        count, offset = part.last - part.first, part.offset + part.first
        assigned = np.fromfile(task.assignments, np.uint8, count, offset=offset)
        chosen = part.first + np.flatnonzero(assigned == SPLITS[task.plan.split])
        rows = part.scan.rows()[chosen]
        if not len(rows):
            continue
        expected = iter(zip(rows["record"].tolist(), rows["hash"].tolist(), strict=True))
        start = int(rows["offset"][0])
        for item in read_documents(part.file.path, part.file.fields, rows["record"], start):
            record, digest = next(expected, (None, ()))
            if not isinstance(item, Document):
                raise _changed(part)
            data = item.text.encode("utf-8")
            if record != item.record or tuple(digest) != text_hash(item.identity(data)):
                raise _changed(part)
            documents.append(item)
            size += len(data)
            if size >= _BATCH_BYTES:
                yield documents, size
                documents, size = [], 0
        if next(expected, None) is not None:
            raise _changed(part)
    if documents:
        yield documents, size


def _changed(part: ShardPart) -> PrepError:
    Path(part.scan.table).unlink(missing_ok=True)  # the next run scans the file again
    return PrepError(f"{part.file.path} changed while the build was running; run the build again")
