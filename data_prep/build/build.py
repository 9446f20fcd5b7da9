"""Corpus -> shards. Reruns are no-ops, killed builds redo unfinished shards, workers never matter.

The ledger in ``OUT/_work`` holds the settings, the scans of the input files, the plan and a note
per finished shard; ``manifest.json`` appears last. A folder of other settings is never overwritten.

Several jobs (a Slurm array) may share a build: they share the scan, each comes to the same plan by
itself, job t of n writes the shards t, t + n, t + 2 n, ..., and ``merge`` writes the manifest when
all are there. Nobody waits for anybody, and the result is bit for bit that of a single job. So is
the dropping of duplicates, which the plan decides for the whole corpus.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from data_prep.build.encode import (
    EncodeTask,
    ShardPart,
    ShardRecord,
    encode_shard,
    load_record,
)
from data_prep.build.ledger import (
    LEDGER_NAME,
    complete,
    load_ledger,
    refuse_other,
)
from data_prep.build.plan import (
    Corpus,
    CorpusPlan,
    ShardPlan,
    corpus_digest,
    plan_corpus,
)
from data_prep.build.report import Finished, report, write_result
from data_prep.build.scan import (
    InputFile,
    report_malformed,
    scan_files,
)
from data_prep.config import BuildConfig
from data_prep.jobs.progress import Progress, say
from data_prep.jobs.workers import available_cpus, run_tasks
from data_prep.sources.files import absolute, expand_inputs, file_stamp
from xlstm_io.errors import PrepError, TokenizerFileError
from xlstm_io.shards.manifest import MANIFEST_NAME, Manifest
from xlstm_io.storage import remove_temporaries, write_atomic
from xlstm_io.tokenizer import Tokenizer, open_tokenizer


def build(config: BuildConfig) -> Manifest | None:
    """Run a build to its end and return the manifest; None when this is one job of several.

    Raises:
        PrepError: bad inputs, or OUT holds shards of other settings or contents.
        Interrupted: a signal arrived; finished shards are kept.
    """
    started = time.monotonic()
    out = Path(config.out)
    work = out / "_work"
    try:
        share = config.share()
    except ValueError as error:
        raise PrepError(str(error)) from None
    workers = config.workers or available_cpus()
    files = [
        InputFile(path, source.name, source.fields)
        for source in config.all_sources()
        for path in expand_inputs(source.input)
    ]
    tokenizer = _open_tokenizer(config.tokenizer)
    settings = {**config.settings(), "tokenizer": tokenizer.sha256}
    stamps = [file_stamp(file.path) for file in files]
    ledger = load_ledger(work)
    if ledger is not None:
        refuse_other(out, ledger["settings"], settings)
        done = complete(out)
        if done is not None and ledger["stamps"] == stamps:
            say(f"{out} is finished and its inputs are unchanged: nothing to do")
            return done
    elif (out / MANIFEST_NAME).exists():
        raise PrepError(
            f"{out} holds finished shards without their ledger (_work); nothing was overwritten: "
            "choose another --out"
        )

    scans = scan_files(files, config.filters(), work, workers, share)
    corpus = plan_build(out, config, files, stamps, scans)
    _check_plan(corpus.plan, config)
    if ledger is not None and ledger["corpus"] != corpus.digest:
        raise PrepError(
            f"{out} was begun with other contents of --input; nothing was overwritten: choose "
            "another --out, or delete the folder"
        )
    fields = {
        "settings": settings,
        "corpus": corpus.digest,
        "stamps": stamps,
        "files": [[absolute(file.path), file.source] for file in files],
        "config": config.model_dump(),
    }
    write_atomic(work / LEDGER_NAME, json.dumps(fields, indent=1).encode() + b"\n")
    for name, data in tokenizer.files.items():
        write_atomic(out / "tokenizer" / name, data)
    scanned = time.monotonic()
    task, tasks = share
    if tasks > 1:
        mine = range(task, len(corpus.plan.shards), tasks)
        _encode(out, config, tokenizer, corpus, list(mine), workers)
        say(
            f"job {task} of {tasks} is done: {len(mine)} of {len(corpus.plan.shards)} shards; when "
            f"all are, run `xlstm-data merge {out}`"
        )
        return None
    everything = list(range(len(corpus.plan.shards)))
    records, bytes_done = _encode(out, config, tokenizer, corpus, everything, workers)
    seconds = {"scan": scanned - started, "tokenize": time.monotonic() - scanned}
    return finish_build(out, config, tokenizer, settings, corpus, records, seconds, bytes_done)


def _open_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of `--tokenizer`, which must define what stands around a document."""
    try:
        tokenizer = open_tokenizer(path)
    except TokenizerFileError as error:
        raise PrepError(
            f"--tokenizer {error}; make one with `python -m data_prep tokenizer` and give "
            "its --out folder"
        ) from None
    tokenizer.document_ids()
    return tokenizer


def plan_build(out: Path, config: BuildConfig, files, stamps, scans) -> Corpus:
    """Decide from the scans what goes into which shard, and log what was malformed."""
    work = out / "_work"
    report_malformed(scans, config.max_bad_share, work / "malformed.log")
    shard_bytes = max(1, int(config.shard_mb * 1e6))
    plan = plan_corpus(files, scans, config.filters(), config.valid_fraction, shard_bytes, work)
    return Corpus(files, stamps, scans, plan, corpus_digest(files, scans))


def _encode(
    out: Path,
    config: BuildConfig,
    tokenizer: Tokenizer,
    corpus: Corpus,
    numbers: list[int],
    workers: int,
) -> tuple[list[ShardRecord], int]:
    """Write the shards ``numbers`` that are not there; their records, and bytes of text done."""
    shards = [corpus.plan.shards[number] for number in numbers]
    records = [load_record(out, shard) for shard in shards]
    todo = [place for place, record in enumerate(records) if record is None]
    if len(todo) < len(shards):
        say(f"{len(shards) - len(todo)} of {len(shards)} shards are finished: kept")
    ends = np.cumsum([scan.documents for scan in corpus.scans]).tolist()
    begins = [0, *ends[:-1]]

    def parts(shard: ShardPlan) -> list[ShardPart]:
        return [
            ShardPart(corpus.files[n], corpus.scans[n], begins[n], first, last)
            for n, first, last in shard.parts
        ]

    tasks = [
        EncodeTask(
            shards[place],
            parts(shards[place]),
            corpus.plan.fate,
            str(tokenizer.path),
            tokenizer.sha256,
            out,
            config.seq_len,
            config.packing,
        )
        for place in todo
    ]
    todo_bytes = sum(shards[place].bytes_in for place in todo)
    with Progress("tokenize", todo_bytes) as progress:
        for place, record in run_tasks(encode_shard, tasks, workers, progress):
            records[todo[place]] = record
            say(f"{record.entry.path}: {record.entry.rows} rows, {record.entry.tokens} tokens")
    return records, todo_bytes


def finish_build(
    out, config, tokenizer, settings, corpus, records, seconds, bytes_done
) -> Manifest:
    """Write the manifest and the report of a build whose shards are all there."""
    names = [source.name for source in config.all_sources()]
    for folder in (out / name for name in [*names, "tokenizer", "_work"]):
        remove_temporaries(folder)
    remove_temporaries(out, "*")
    finished = Finished(config, tokenizer, settings, corpus, records, seconds, bytes_done)
    manifest = write_result(out, finished)
    report(out, manifest, finished)
    return manifest


def _check_plan(plan: CorpusPlan, config: BuildConfig) -> None:
    kept = {"train": 0, "valid": 0}
    for shard in plan.shards:
        kept[shard.split] += shard.documents
    total = sum(kept.values())
    if total == 0:
        counts = {}
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
