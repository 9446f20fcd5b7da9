"""Corpus -> shards. Reruns are no-ops, killed builds redo unfinished shards, workers never matter.

The ledger in ``OUT/_work`` holds the settings, the scans of the input files and a note per finished
shard; ``manifest.json`` appears last. A folder of other settings is never overwritten.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from data_prep.encode import EncodeTask, ShardRecord, encode_shard, load_record
from data_prep.errors import PrepError
from data_prep.parallel import available_cpus, run_tasks
from data_prep.progress import Progress, say
from data_prep.readers import PROVENANCE_NAME, expand_inputs
from data_prep.scan import CorpusPlan, file_stamp, plan_shards, report_malformed, scan_files
from data_prep.shards import (
    MANIFEST_NAME,
    Manifest,
    ShardFormatError,
    check_size,
    default_block_rows,
    load_manifest,
    token_dtype,
    write_atomic,
    write_manifest,
)
from data_prep.tokenizer import Tokenizer

_TOKENIZER_COPY = Path("tokenizer") / "tokenizer.model"


class BuildConfig(BaseModel):
    """Settings of a build: keys of ``prep.yaml`` and flags of the command line alike."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    input: list[str] = Field(min_length=1)
    """Files, folders or quoted globs: jsonl, parquet, text; also .gz and .zst."""
    tokenizer: str
    """Folder of a trained tokenizer, or a SentencePiece .model file."""
    out: str
    """Folder for the shards."""
    seq_len: int = Field(256, ge=2)
    """Context length: a row holds seq_len + 1 tokens."""
    packing: Literal["concat", "best_fit"] = "concat"
    """Rows as one chopped stream, or documents kept whole and rows filled up with padding."""
    valid_fraction: float = Field(0.01, ge=0.0, le=0.5)
    """Share of the documents for validation, chosen by the hash of the text."""
    source: str = "corpus"
    """Name of the corpus: a folder in OUT."""
    text_field: str = "text"
    """Field (jsonl) or column (parquet) of the text."""
    shard_mb: float = Field(64.0, gt=0)
    """Megabytes of text per shard, the unit of parallel work and of redoing."""
    max_bad_share: float = Field(0.1, ge=0.0, le=1.0)
    """Share of malformed records above which the build refuses the corpus."""
    workers: int = Field(0, ge=0)
    """Processes; 0 takes every core that the job may use. Does not change the output."""

    @field_validator("input", mode="before")
    @classmethod
    def _one_is_a_list(cls, value):
        return [value] if isinstance(value, str) else value

    @field_validator("source")
    @classmethod
    def _usable_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value) or value == "tokenizer":
            raise ValueError("must be letters, digits, '.', '_', '-' and not 'tokenizer'")
        return value


def build(config: BuildConfig) -> Manifest:
    """Run a build to its end and return the manifest.

    Raises:
        PrepError: bad inputs, or OUT holds shards of other settings or contents.
        Interrupted: a signal arrived; finished shards are kept.
    """
    started = time.monotonic()
    out = Path(config.out)
    work = out / "_work"
    workers = config.workers or available_cpus()
    paths = expand_inputs(config.input)
    tokenizer = Tokenizer(Path(config.tokenizer))
    settings = _settings(config, tokenizer)
    stamps = [file_stamp(path) for path in paths]
    ledger = _load_ledger(work)
    if ledger is not None:
        _refuse_other(out, ledger["settings"], settings)
        done = _complete(out)
        if done is not None and ledger["inputs"] == stamps:
            say(f"{out} is finished and its inputs are unchanged: nothing to do")
            return done
    elif (out / MANIFEST_NAME).exists():
        raise PrepError(
            f"{out} holds finished shards without their ledger (_work); nothing was overwritten: "
            "choose another --out"
        )

    scans = scan_files(paths, config.text_field, work, workers)
    report_malformed(scans, config.max_bad_share)
    plan = plan_shards(scans, config.valid_fraction, max(1, int(config.shard_mb * 1e6)))
    _check_plan(plan, config)
    if ledger is not None and ledger["corpus"] != plan.digest:
        raise PrepError(
            f"{out} was begun with other contents of --input; nothing was overwritten: choose "
            "another --out, or delete the folder"
        )
    fields = {"settings": settings, "corpus": plan.digest, "inputs": stamps}
    write_atomic(work / "build.json", json.dumps(fields, indent=1).encode() + b"\n")
    write_atomic(out / _TOKENIZER_COPY, tokenizer.model)

    tasks = [
        EncodeTask(
            shard,
            paths,
            config.text_field,
            str(tokenizer.path),
            tokenizer.sha256,
            out,
            config.source,
            config.seq_len,
            config.packing,
        )
        for shard in plan.shards
    ]
    encoding = time.monotonic()
    records = [load_record(out, config.source, shard) for shard in plan.shards]
    kept = sum(record is not None for record in records)
    todo = [number for number, record in enumerate(records) if record is None]
    if kept:
        say(f"{kept} of {len(records)} shards are finished: kept")
    todo_bytes = sum(plan.shards[number].bytes_in for number in todo)
    with Progress("tokenize", todo_bytes) as progress:
        for place, record in run_tasks(encode_shard, [tasks[n] for n in todo], workers, progress):
            records[todo[place]] = record
            say(f"{record.entry.path}: {record.entry.rows} rows, {record.entry.tokens} tokens")
    finished = time.monotonic()
    for folder in (out / config.source, work):  # left by killed processes
        for temporary in folder.rglob("*.tmp.*"):
            temporary.unlink(missing_ok=True)

    manifest = _write_manifest(out, config, tokenizer, settings, plan, records, paths)
    seconds = {"scan": encoding - started, "tokenize": finished - encoding}
    _report(out, manifest, plan, records, seconds, todo_bytes, min(workers, max(1, len(todo))))
    return manifest


def _settings(config: BuildConfig, tokenizer: Tokenizer) -> dict:
    """What the shards' contents depend on, besides the corpus."""
    names = ("seq_len", "valid_fraction", "source", "text_field", "shard_mb", "packing")
    return {
        **{name: getattr(config, name) for name in names},
        "tokenizer": tokenizer.sha256,
    }


def _load_ledger(work: Path) -> dict | None:
    try:
        ledger = json.loads((work / "build.json").read_bytes())
        return {key: ledger[key] for key in ("settings", "corpus", "inputs")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise PrepError(
            f"{work / 'build.json'} is damaged; delete {work.parent} or choose another --out"
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
    kept = {split: 0 for split in ("train", "valid")}
    for shard in plan.shards:
        kept[shard.split] += sum(len(records) for _, records, _ in shard.parts)
    total = sum(kept.values())
    if total == 0:
        raise PrepError(f"--input: no text in field {config.text_field!r}; all documents are empty")
    if config.valid_fraction > 0 and kept["valid"] == 0:
        raise PrepError(
            f"none of the {total} documents fell into validation with --valid-fraction "
            f"{config.valid_fraction}; raise it, give more documents, or set it to 0"
        )
    if kept["train"] == 0:
        raise PrepError(
            f"all {total} documents fell into validation with --valid-fraction "
            f"{config.valid_fraction}; lower it or give more documents"
        )


def _provenance(paths: list[Path]) -> dict | None:
    """The notes ``SOURCE.json`` beside the inputs: licence and origin."""
    notes = []
    for folder in sorted({path.parent for path in paths}):
        file = folder / PROVENANCE_NAME
        if file.exists():
            try:
                note = json.loads(file.read_bytes())
            except ValueError as error:
                raise PrepError(f"{file}: not JSON ({error}); repair or remove it") from None
            notes.append(note if isinstance(note, dict) else {"note": note})
    if not notes:
        return None
    return notes[0] if len(notes) == 1 else {"sources": notes}


def _write_manifest(out, config, tokenizer, settings, plan, records, paths) -> Manifest:
    splits = {}
    for split in ("train", "valid"):
        pairs = zip(plan.shards, records, strict=True)
        entries = [record.entry for shard, record in pairs if shard.split == split]
        names = ("rows", "tokens", "targets", "pad_tokens", "docs", "bytes_in")
        totals = {name: sum(getattr(entry, name) for entry in entries) for name in names}
        splits[split] = {**totals, "shards": [entry.model_dump() for entry in entries]}
    dtype = token_dtype(tokenizer.vocab_size)
    identity = json.dumps({"settings": settings, "corpus": plan.digest}, sort_keys=True)
    fields = {
        "dtype": dtype.name,
        "seq_len": config.seq_len,
        "row_tokens": config.seq_len + 1,
        "block_rows": default_block_rows(config.seq_len + 1, dtype),
        "packing": config.packing,
        "add_bos": True,
        "add_eos": True,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "tokenizer": {
            "type": "sentencepiece",
            "path": _TOKENIZER_COPY.as_posix(),
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
        },
        "valid_fraction": config.valid_fraction,
        "config_hash": hashlib.sha256(identity.encode()).hexdigest(),
        "sources": [
            {
                "name": config.source,
                "provenance": _provenance(paths),
                "documents_read": plan.documents_read,
                "dropped": plan.dropped,
                "splits": splits,
            }
        ],
        "code": {"version": metadata.version("xlstm-pretrain")},
    }
    return write_manifest(out, fields)


def _report(out, manifest, plan, records: list[ShardRecord], seconds, todo_bytes, workers) -> None:
    """Print the final report and store it under ``_work``."""
    splits = manifest.sources[0].splits
    train, valid = splits["train"], splits["valid"]
    tokens, text = train.tokens + valid.tokens, train.bytes_in + valid.bytes_in
    dropped = ", ".join(f"{count} {reason}" for reason, count in plan.dropped.items())
    histogram = np.sum([record.histogram for record in records], axis=0)
    rate = todo_bytes / 1e6 / seconds["tokenize"] if todo_bytes else 0.0
    checked = sum(record.round_trips for record in records)
    lossy = sum(record.lossy for record in records)
    say(f"documents   {train.docs + valid.docs} kept of {plan.documents_read} read; {dropped}")
    say(f"tokens      {tokens} ({text / tokens:.2f} bytes/token)")
    for name, part in splits.items():
        say(
            f"{name:11s} {part.docs} documents, {part.tokens} tokens, {part.rows} rows of "
            f"{manifest.seq_len}, {part.pad_tokens} padding, {len(part.shards)} shards"
        )
    lengths = [f"{1 << power}: {count}" for power, count in enumerate(histogram) if count]
    say(f"lengths     documents of at least so many tokens (powers of 2): {', '.join(lengths)}")
    say(f"round trip  {checked - lossy} of {checked} checked documents come back unchanged")
    say(
        f"time        scan {seconds['scan']:.1f} s, tokenize {seconds['tokenize']:.1f} s, "
        f"{rate:.2f} MB/s, {workers} workers"
    )
    say(f"manifest    {out / MANIFEST_NAME}  hash {manifest.hash[:12]}")
    report = {
        "seconds": seconds,
        "mb_per_second": rate,
        "histogram_log2": histogram.tolist(),
        "round_trips": checked,
        "lossy": lossy,
    }
    write_atomic(out / "_work" / "report.json", json.dumps(report, indent=1).encode() + b"\n")
