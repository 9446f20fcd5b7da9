"""Makes shards of what Megatron-LM has tokenized, with the same ids.

Each stretch of a corpus becomes a shard of the training split and one of the validation split, so
the work is parallel, and a killed run redoes its unfinished stretches. The split of a document
follows from the hash of its decoded text, as in a build of the text.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_prep.build.encode import tokenizer_of_worker
from data_prep.build.notes import read_note, write_note
from data_prep.build.pack import Packing, as_stored, make_packer, write_shard
from data_prep.build.plan import SPLIT_RESOLUTION, SPLITS
from data_prep.build.report import code_fields, format_fields
from data_prep.jobs.progress import Progress, say
from data_prep.jobs.workers import Tick, Workers, available_cpus
from data_prep.sources.documents import text_hash
from data_prep.sources.files import file_fingerprint
from data_prep.sources.formats.megatron import MegatronCorpus
from data_prep.tools.finished import is_finished
from xlstm_io.errors import PrepError
from xlstm_io.foreign.json_file import StrictModel
from xlstm_io.shards.manifest import (
    Count,
    Manifest,
    ShardEntry,
    SplitName,
    load_manifest,
    split_fields,
    write_manifest,
)
from xlstm_io.shards.rows import token_dtype
from xlstm_io.shards.shard import entry_is_there
from xlstm_io.storage import file_version, remove_temporaries, write_atomic
from xlstm_io.tokenizer import Tokenizer, open_tokenizer

_STATE_NAME = "import.json"


@dataclass(frozen=True)
class ImportSettings:
    """What the shards depend on, besides corpus and tokenizer.

    Attributes:
        source: name of the corpus, a folder in OUT.
        seq_len: context length.
        packing: "concat" or "best_fit".
        valid_fraction: share of the documents for validation.
        shard_mb: megabytes of tokens in a shard.
    """

    source: str
    seq_len: int
    packing: Packing
    valid_fraction: float
    shard_mb: float


@dataclass(frozen=True)
class ImportTask:
    """A stretch of a corpus: the documents `first` up to `last` of `prefix`."""

    prefix: str
    first: int
    last: int
    number: int
    size: int
    tokenizer: str
    tokenizer_sha256: str
    out: Path
    settings: ImportSettings

    def shard_path(self, split: str) -> str:
        """The shard of a split, relative to `out`."""
        return f"{self.settings.source}/{split}/shard-{self.number:08d}.tar"

    @property
    def record_path(self) -> Path:
        """Where the entries of the finished shards are kept."""
        return self.out / "_work" / "done" / f"{self.number:08d}.json"


class StretchRecord(StrictModel):
    """A finished stretch: its shards by split, and how many documents it has, and empty ones."""

    entries: dict[SplitName, ShardEntry]
    read: Count
    empty: Count


def import_megatron(
    prefixes: list[str], tokenizer_path: Path, out: Path, settings: ImportSettings, workers: int = 0
) -> Manifest:
    """Write the documents of PREFIX.bin and PREFIX.idx as shards.

    Args:
        prefixes: paths without `.bin` and `.idx`.
        tokenizer_path: the tokenizer that made the ids.
        out: folder of the shards.
        settings: how they are laid out.
        workers: processes; 0 takes every core. Does not change the output.

    Raises:
        PrepError: files that do not fit together, ids that the tokenizer does not have, or `out`
            holds something else.
        TokenizerFileError: the tokenizer defines no bos or eos.
    """
    tokenizer = open_tokenizer(tokenizer_path)
    tokenizer.document_ids()  # it must define what stands around a document
    files = [f"{prefix}.{kind}" for prefix in prefixes for kind in ("idx", "bin")]
    tasks = _tasks(prefixes, tokenizer, out, settings)
    identity = {
        "inputs": [file_fingerprint(file)[1:] for file in files],
        "tokenizer": tokenizer.sha256,
        **settings.__dict__,
    }
    if is_finished(out, _STATE_NAME, identity):
        say(f"{out} is finished: nothing to do")
        return load_manifest(out)
    write_atomic(out / "_work" / _STATE_NAME, json.dumps(identity).encode() + b"\n")
    for name, data in tokenizer.files.items():
        write_atomic(out / "tokenizer" / name, data)

    records = {n: record for n, task in enumerate(tasks) if (record := _load_record(task))}
    todo = [number for number in range(len(tasks)) if number not in records]
    chosen, total = [tasks[number] for number in todo], sum(tasks[number].size for number in todo)
    with Workers(workers or available_cpus()) as processes, Progress("import", total) as progress:
        for place, record in processes.run(import_stretch, chosen, progress):
            records[todo[place]] = record
    remove_temporaries(out)
    done = [records[number] for number in range(len(tasks))]
    splits = {
        name: [record.entries[name].model_dump() for record in done if name in record.entries]
        for name in SPLITS
    }
    if not splits["train"]:
        raise PrepError(f"{', '.join(prefixes)}: no document is left for training")
    manifest = write_manifest(
        out,
        {
            **format_fields(
                tokenizer,
                seq_len=settings.seq_len,
                packing=settings.packing,
                valid_fraction=settings.valid_fraction,
            ),
            "config_hash": hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
            "sources": [
                {
                    "name": settings.source,
                    "provenance": None,
                    "documents_read": sum(record.read for record in done),
                    "dropped": {"empty": sum(record.empty for record in done)},
                    "filters": {},
                    "splits": {name: split_fields(shards) for name, shards in splits.items()},
                }
            ],
            "code": code_fields(),
        },
    )
    for name, split in manifest.sources[0].splits.items():
        say(f"{name}: {split.docs} documents, {split.tokens} tokens, {split.rows} rows")
    say(f"manifest {out}  hash {manifest.hash[:12]}")
    return manifest


def _tasks(
    prefixes: list[str], tokenizer: Tokenizer, out: Path, settings: ImportSettings
) -> list[ImportTask]:
    opened = str(tokenizer.path), tokenizer.sha256
    tasks: list[ImportTask] = []
    for prefix in prefixes:
        sizes = MegatronCorpus(prefix).bytes_of_documents()
        places = (np.cumsum(sizes) - sizes) // max(1, int(settings.shard_mb * 1e6))
        bounds = [*np.unique(places, return_index=True)[1].tolist(), len(sizes)]
        for first, last in pairwise(bounds):
            size = int(sizes[first:last].sum())
            number = len(tasks)
            tasks.append(ImportTask(prefix, first, last, number, size, *opened, out, settings))
    return tasks


def _load_record(task: ImportTask) -> StretchRecord | None:
    record = read_note(StretchRecord, task.record_path)
    if record is None:
        return None
    for split, entry in record.entries.items():
        if entry.path != task.shard_path(split) or not entry_is_there(task.out, entry):
            return None
    return record


@lru_cache(maxsize=1)
def _corpus_of_worker(prefix: str, version: str) -> MegatronCorpus:
    """The corpus, opened once: an index may have gigabytes, all of which are checked."""
    return MegatronCorpus(prefix)


def import_stretch(task: ImportTask, tick: Tick) -> StretchRecord:
    """Write the shards of one stretch; its record.

    Raises:
        PrepError: an id is not one of the tokenizer's.
    """
    tokenizer = tokenizer_of_worker(task.tokenizer, task.tokenizer_sha256)
    corpus = _corpus_of_worker(task.prefix, file_version(Path(f"{task.prefix}.idx")))
    ids, dtype = tokenizer.document_ids(), token_dtype(tokenizer.vocab_size)
    limit = round(task.settings.valid_fraction * SPLIT_RESOLUTION)
    kept: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    text_bytes = dict.fromkeys(SPLITS, 0)
    empty = 0
    for number, tokens in enumerate(corpus.documents(task.first, task.last), task.first):
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < tokenizer.vocab_size:
            raise PrepError(
                f"{task.prefix}: document {number} has the ids {tokens.min()} to {tokens.max()}, "
                f"and --tokenizer has {tokenizer.vocab_size}; give the one that made them"
            )
        inner = tokens[int(len(tokens) > 0 and tokens[0] == ids.bos) :]
        inner = inner[: len(inner) - int(len(inner) > 0 and inner[-1] == ids.eos)]
        tick(tokens.nbytes)
        if not len(inner):
            empty += 1
            continue
        data = tokenizer.decode(inner).encode("utf-8", "replace")
        split = "valid" if text_hash(data)[1] % SPLIT_RESOLUTION < limit else "train"
        kept[split].append(as_stored(inner, ids.bos, ids.eos, dtype))
        text_bytes[split] += len(data)
    entries = {}
    for split, documents in kept.items():
        if documents:
            path = task.shard_path(split)
            packer = make_packer(task.settings.packing, task.settings.seq_len, dtype, ids.pad)
            entry = write_shard(task.out, path, documents, packer, bytes_in=text_bytes[split])
            entries[split] = entry
    record = StretchRecord(entries=entries, read=task.last - task.first, empty=empty)
    write_note(task.record_path, record.model_dump())
    return record
