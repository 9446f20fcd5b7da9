"""What a finished build leaves: the manifest, and a report with a picture of document lengths."""

import hashlib
import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.build.encode import BINS_PER_OCTAVE, ShardRecord
from data_prep.build.pack import Packing
from data_prep.build.plan import SPLITS, Corpus
from data_prep.config import BuildConfig, SourceConfig
from data_prep.jobs.progress import say
from data_prep.sources.files import provenance_notes
from xlstm_io.remote import masked_values
from xlstm_io.shards.manifest import MANIFEST_NAME, Manifest, split_fields, write_manifest
from xlstm_io.shards.rows import token_dtype
from xlstm_io.shards.shard import default_block_rows
from xlstm_io.storage import remove_temporaries, write_atomic
from xlstm_io.terminal import counted
from xlstm_io.tokenizer import DocumentIds, Tokenizer


@dataclass(frozen=True)
class Finished:
    """A build whose shards are all written.

    Attributes:
        config: its configuration.
        tokenizer: its tokenizer.
        settings: what the contents of the shards depend on, besides the corpus.
        corpus: input files and plan.
        records: of the shards, in the order of the plan.
        seconds: wall clock of the passes that this run did.
        bytes_done: text that this run tokenized.
    """

    config: BuildConfig
    tokenizer: Tokenizer
    settings: dict[str, Any]
    corpus: Corpus
    records: list[ShardRecord]
    seconds: dict[str, float]
    bytes_done: int


def finish_build(out: Path, finished: Finished) -> Manifest:
    """Write the manifest and the report of a build whose shards are all there."""
    names = [source.name for source in finished.config.all_sources()]
    for folder in (out / name for name in [*names, "tokenizer", "_work"]):
        remove_temporaries(folder)
    remove_temporaries(out, "*")
    manifest = _write_manifest(out, finished)
    _report(out, manifest, finished)
    return manifest


def _write_manifest(out: Path, finished: Finished) -> Manifest:
    config, plan = finished.config, finished.corpus.plan
    identity = {"settings": finished.settings, "corpus": finished.corpus.digest}
    sources = [
        {
            "name": source.name,
            "provenance": _provenance(finished, source),
            "documents_read": plan.documents_read[source.name],
            "dropped": plan.dropped[source.name],
            "filters": {**finished.settings["filters"], **source.choice()},
            "splits": {split: _split(finished, source.name, split) for split in SPLITS},
        }
        for source in config.all_sources()
        if source.name in plan.documents_read  # extending, a source may have no new file
    ]
    fields: dict[str, Any] = {
        **format_fields(
            finished.tokenizer,
            seq_len=config.seq_len,
            packing=config.packing,
            valid_fraction=config.valid_fraction,
            labels=config.labels,
        ),
        "config_hash": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        "sources": sources,
        "code": code_fields(),
    }
    if finished.corpus.earlier is not None:
        fields["sources"] = _joined(finished.corpus.earlier.manifest, sources)
        fields["parent"] = finished.corpus.earlier.manifest.hash
    return write_manifest(out, fields)


def format_fields(
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    packing: Packing,
    valid_fraction: float,
    labels: bool = False,
) -> dict[str, Any]:
    """The fields of a manifest that say how its shards are written.

    Samples of synthetic tasks, whose tokenizer names no bos, stand without bos and eos.
    """
    dtype, marked = token_dtype(tokenizer.vocab_size), tokenizer.bos_id is not None
    ids = tokenizer.document_ids() if marked else DocumentIds(0, 0, 0)
    return {
        "dtype": dtype.name,
        "seq_len": seq_len,
        "row_tokens": seq_len + 1,
        "block_rows": default_block_rows(seq_len + 1, dtype),
        "packing": packing,
        "add_bos": marked,
        "add_eos": marked,
        "bos_id": ids.bos,
        "eos_id": ids.eos,
        "pad_id": ids.pad,
        "tokenizer": {
            "type": tokenizer.kind,
            "path": f"tokenizer/{next(iter(tokenizer.files))}",
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
        },
        "valid_fraction": valid_fraction,
        **({"labels": True} if labels else {}),
    }


def code_fields() -> dict[str, str]:
    """What wrote a manifest."""
    return {"version": metadata.version("xlstm-pretrain")}


def _joined(parent: Manifest, sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sources of an extended folder, each followed by its new shards, then the new sources."""
    new = {source["name"]: source for source in sources}
    joined = []
    for old in (source.model_dump() for source in parent.sources):
        more = new.pop(old["name"], None)
        if more is not None:
            old["documents_read"] += more["documents_read"]
            reasons = [*old["dropped"], *more["dropped"]]
            old["dropped"] = {
                reason: old["dropped"].get(reason, 0) + more["dropped"].get(reason, 0)
                for reason in reasons
            }
            notes = [note for note in (old["provenance"], more["provenance"]) if note]
            if len(notes) == 2 and notes[0] != notes[1]:
                notes = [{"sources": notes}]
            old["provenance"] = notes[0] if notes else None
            for name, split in more["splits"].items():
                shards = old["splits"].get(name, {"shards": []})["shards"]
                old["splits"][name] = split_fields([*shards, *split["shards"]])
        joined.append(old)
    return [*joined, *new.values()]


def _split(finished: Finished, source: str, split: str) -> dict[str, Any]:
    pairs = zip(finished.corpus.plan.shards, finished.records, strict=True)
    entries = [
        record.entry for plan, record in pairs if (plan.source, plan.split) == (source, split)
    ]
    return split_fields([entry.model_dump() for entry in entries])


def _provenance(finished: Finished, source: SourceConfig) -> dict[str, Any] | None:
    """What the settings and the notes beside the inputs say about licence and origin."""
    stated = {"licence": source.licence, "origin": source.origin}
    stated = {key: value for key, value in stated.items() if value}
    notes = provenance_notes([f.path for f in finished.corpus.files if f.source == source.name])
    if len(notes) == 1:
        return masked_values({**notes[0], **stated})
    return masked_values({**({"sources": notes} if notes else {}), **stated}) or None


def _report(out: Path, manifest: Manifest, finished: Finished) -> None:
    """Print the final report; store it and the histogram of lengths under `_work`."""
    records, seconds = finished.records, finished.seconds
    entries = [record.entry for record in records]
    tokens, text = (sum(getattr(e, name) for e in entries) for name in ("tokens", "bytes_in"))
    histogram = np.sum([record.histogram for record in records], axis=0)
    checked = sum(record.round_trips for record in records)
    lossy = sum(record.lossy for record in records)
    for source in manifest.sources:
        kept = sum(split.docs for split in source.splits.values())
        dropped = ", ".join(f"{count} {reason}" for reason, count in source.dropped.items())
        say(f"documents   {source.name}: {kept} kept of {source.documents_read} read; {dropped}")
        for name, part in source.splits.items():
            say(
                f"  {name:9s} {part.docs} documents, {part.tokens} tokens, {part.rows} rows of "
                f"{manifest.seq_len}, {part.pad_tokens} padding, "
                f"{counted(len(part.shards), 'shard')}"
            )
    say(f"tokens      {tokens} ({text / max(1, tokens):.2f} bytes/token)")
    octaves = histogram.reshape(-1, BINS_PER_OCTAVE).sum(axis=1)
    lengths = [
        f"{count} of {1 << power}-{(2 << power) - 1}"
        for power, count in enumerate(octaves)
        if count
    ]
    say(f"lengths     documents by their tokens, with bos and eos: {', '.join(lengths)}")
    say(f"round trip  {checked - lossy} of {checked} checked documents come back unchanged")
    rate = finished.bytes_done / 1e6 / seconds["tokenize"] if finished.bytes_done else 0.0
    if seconds:
        say(
            f"time        scan {seconds['scan']:.1f} s, tokenize {seconds['tokenize']:.1f} s, "
            f"{rate:.2f} MB/s"
        )
    picture = out / "_work" / "lengths.png"
    _plot_lengths(picture, histogram, manifest.seq_len)
    say(f"picture     {picture}")
    say(f"manifest    {out / MANIFEST_NAME}  hash {manifest.hash[:12]}")
    fields = {
        "documents_read": {s.name: s.documents_read for s in manifest.sources},
        "dropped": {s.name: s.dropped for s in manifest.sources},
        "documents": sum(entry.docs for entry in entries),
        "tokens": tokens,
        "bytes_per_token": text / max(1, tokens),
        "pad_tokens": sum(entry.pad_tokens for entry in entries),
        "seconds": seconds,
        "mb_per_second": rate,
        "histogram_log2": octaves.tolist(),
        "round_trips": checked,
        "lossy": lossy,
    }
    write_atomic(out / "_work" / "report.json", json.dumps(fields, indent=1).encode() + b"\n")


def _plot_lengths(path: Path, histogram: np.ndarray, seq_len: int) -> None:
    """Documents, and their tokens, by length; a line marks the length of a row."""
    from matplotlib.figure import Figure  # slow to import; no display is asked for

    used = np.flatnonzero(histogram)
    bins = np.arange(used[0], used[-1] + 1)
    edges = 2.0 ** (np.append(bins, bins[-1] + 1) / BINS_PER_OCTAVE)
    counts = histogram[bins]
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    left.stairs(counts, edges, fill=True, color="tab:blue", alpha=0.6, label="documents")
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.set_xlabel("tokens in the document, with bos and eos")
    left.set_ylabel("documents", color="tab:blue")
    right = left.twinx()
    # A bin's tokens, as if its documents lay in its (geometric) middle.
    middle = np.sqrt(edges[:-1] * edges[1:])
    right.stairs(counts * middle / (counts * middle).sum(), edges, color="tab:orange", lw=1.5)
    right.set_ylabel("share of all tokens", color="tab:orange")
    right.set_ylim(bottom=0)
    left.set_ylim(top=1.15 * counts.max())  # room for the line's label
    left.axvline(seq_len + 1, color="black", ls="--", lw=1)
    left.annotate(
        f"row: {seq_len}",
        (seq_len + 1, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        va="top",
    )
    left.set_title(f"{counts.sum()} documents")
    figure.savefig(path, dpi=120)
