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
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.config import BuildConfig
from data_prep.encode import EncodeTask, ShardPart, ShardRecord, encode_shard, load_record
from data_prep.errors import PrepError
from data_prep.files import absolute, expand_inputs, file_stamp
from data_prep.parallel import available_cpus, run_tasks
from data_prep.plan import DROPPED, Corpus, CorpusPlan, ShardPlan, corpus_digest, plan_corpus
from data_prep.progress import Progress, say
from data_prep.scan import (
    FileScan,
    InputFile,
    load_scan,
    report_malformed,
    scan_files,
    scan_note,
)
from data_prep.shards import (
    MANIFEST_NAME,
    Manifest,
    ShardFormatError,
    check_size,
    load_manifest,
    remove_temporaries,
    write_atomic,
)
from data_prep.summary import Finished, report, write_result
from data_prep.tokenizer import Tokenizer, load_tokenizer

_LEDGER_NAME = "build.json"


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
    tokenizer = load_tokenizer(config.tokenizer)
    settings = {**config.settings(), "tokenizer": tokenizer.sha256}
    stamps = [file_stamp(file.path) for file in files]
    ledger = _load_ledger(work)
    if ledger is not None:
        _refuse_other(out, ledger["settings"], settings)
        done = _complete(out)
        if done is not None and ledger["stamps"] == stamps:
            say(f"{out} is finished and its inputs are unchanged: nothing to do")
            return done
    elif (out / MANIFEST_NAME).exists():
        raise PrepError(
            f"{out} holds finished shards without their ledger (_work); nothing was overwritten: "
            "choose another --out"
        )

    scans = scan_files(files, config.filters(), work, workers, share)
    corpus = _plan(out, config, files, stamps, scans)
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
    write_atomic(work / _LEDGER_NAME, json.dumps(fields, indent=1).encode() + b"\n")
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
    return _finish(out, config, tokenizer, settings, corpus, records, seconds, bytes_done)


def merge_jobs(out: Path) -> Manifest:
    """Write the manifest of a build that several jobs shared, once all its shards are there.

    Raises:
        PrepError: no build there, or shards are missing (which, and what to run).
    """
    work = out / "_work"
    ledger = _load_ledger(work)
    if ledger is None:
        raise PrepError(f"{out}: no build was begun there ({work / _LEDGER_NAME} is missing)")
    done = _complete(out)
    if done is not None:
        say(f"{out} is finished: nothing to do")
        return done
    config = BuildConfig.model_validate(ledger["config"])
    tokenizer = load_tokenizer(out / "tokenizer")
    scans = _stored_scans(out, config, ledger)
    if None in scans:
        raise PrepError(f"{out}: scans in {work / 'scan'} are gone; run the build again")
    corpus = _plan(out, config, _ledger_files(config, ledger), ledger["stamps"], scans)
    shards = corpus.plan.shards
    records = [load_record(out, shard) for shard in shards]
    missing = [number for number, record in enumerate(records) if record is None]
    if missing:
        numbers = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise PrepError(
            f"{out}: {len(missing)} of {len(shards)} shards are not finished (numbers {numbers}); "
            "job t of n writes the numbers t, t + n, ...: run those jobs again (--task t --tasks "
            "n), or the build with --tasks 1, which does what is left"
        )
    return _finish(out, config, tokenizer, ledger["settings"], corpus, records, {}, 0)


def kept_hashes(out: Path) -> Iterator[np.ndarray]:
    """Hashes uint64 [n, 2] of the documents in a finished build, file after file.

    Raises:
        PrepError: the folder's notes are not there (it was repacked or joined, or they were
            deleted).
    """
    ledger = _load_ledger(out / "_work")
    config = ledger and BuildConfig.model_validate(ledger["config"])
    scans = _stored_scans(out, config, ledger) if ledger else [None]
    if None in scans:
        raise PrepError(f"{out} does not say which documents it holds (_work is gone)")
    plan = _plan(out, config, _ledger_files(config, ledger), ledger["stamps"], scans).plan
    fates = np.fromfile(plan.fate, np.uint8)
    first = 0
    for scan in scans:
        yield scan.rows()["hash"][fates[first : first + scan.documents] != DROPPED]
        first += scan.documents


def _ledger_files(config: BuildConfig, ledger: dict) -> list[InputFile]:
    fields = {source.name: source.fields for source in config.all_sources()}
    return [InputFile(path, source, fields[source]) for path, source in ledger["files"]]


def _stored_scans(out: Path, config: BuildConfig, ledger: dict) -> list[FileScan | None]:
    pairs = zip(_ledger_files(config, ledger), ledger["stamps"], strict=True)
    filters = config.filters()
    return [load_scan(scan_note(file, stamp, filters, out / "_work")) for file, stamp in pairs]


def _plan(out: Path, config: BuildConfig, files, stamps, scans) -> Corpus:
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


def _finish(out, config, tokenizer, settings, corpus, records, seconds, bytes_done) -> Manifest:
    names = [source.name for source in config.all_sources()]
    for folder in (out / name for name in [*names, "tokenizer", "_work"]):
        remove_temporaries(folder)
    remove_temporaries(out, "*")
    finished = Finished(config, tokenizer, settings, corpus, records, seconds, bytes_done)
    manifest = write_result(out, finished)
    report(out, manifest, finished)
    return manifest


def _load_ledger(work: Path) -> dict | None:
    try:
        ledger = json.loads((work / _LEDGER_NAME).read_bytes())
        return {key: ledger[key] for key in ("settings", "corpus", "stamps", "files", "config")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise PrepError(
            f"{work / _LEDGER_NAME} is damaged; delete {work.parent} or choose another --out"
        ) from None


def _refuse_other(out: Path, stored: dict, settings: dict) -> None:
    changed = [
        f"{key} {stored.get(key)} -> {value}"
        for key, value in settings.items()
        if stored.get(key) != value
    ]
    if changed:
        raise PrepError(
            f"{out} holds shards of other settings ({', '.join(changed)}); nothing was "
            "overwritten: choose another --out, or delete the folder"
        )


def _complete(out: Path) -> Manifest | None:
    """The manifest of a finished build whose shards are all there, else None."""
    try:
        manifest = load_manifest(out)
        for split in ("train", "valid"):
            for entry in manifest.shards(split):
                check_size(manifest.root, entry)
                if not (manifest.root / entry.index).exists():
                    return None
        return manifest if manifest.tokenizer_path.exists() else None
    except ShardFormatError:
        return None


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
