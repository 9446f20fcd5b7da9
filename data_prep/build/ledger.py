"""The record of a build in ``OUT/_work``: its settings, its inputs, and what of it is there."""

from __future__ import annotations

import json
from pathlib import Path

from data_prep.build.scan import (
    FileScan,
    InputFile,
    load_scan,
    scan_note,
)
from data_prep.config import BuildConfig
from xlstm_io.errors import PrepError, ShardFormatError
from xlstm_io.shards.manifest import Manifest, load_manifest
from xlstm_io.shards.shard import check_size

LEDGER_NAME = "build.json"


def ledger_files(config: BuildConfig, ledger: dict) -> list[InputFile]:
    """The input files of a build, in the order of its plan."""
    fields = {source.name: source.fields for source in config.all_sources()}
    return [InputFile(path, source, fields[source]) for path, source in ledger["files"]]


def stored_scans(out: Path, config: BuildConfig, ledger: dict) -> list[FileScan | None]:
    """The stored scan of each input file; None where it is gone."""
    pairs = zip(ledger_files(config, ledger), ledger["stamps"], strict=True)
    filters = config.filters()
    return [load_scan(scan_note(file, stamp, filters, out / "_work")) for file, stamp in pairs]


def load_ledger(work: Path) -> dict | None:
    """The ledger in ``OUT/_work``; None when no build was begun. PrepError when it is damaged."""
    try:
        ledger = json.loads((work / LEDGER_NAME).read_bytes())
        return {key: ledger[key] for key in ("settings", "corpus", "stamps", "files", "config")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise PrepError(
            f"{work / LEDGER_NAME} is damaged; delete {work.parent} or choose another --out"
        ) from None


def refuse_other(out: Path, stored: dict, settings: dict) -> None:
    """PrepError when OUT was begun with other settings; the message lists the differences."""
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


def complete(out: Path) -> Manifest | None:
    """The manifest of a finished build whose shards are all there, else None."""
    try:
        manifest = load_manifest(out)
        for split in ("train", "valid"):
            for entry in manifest.shards(split):
                check_size(manifest.root, entry)
                if not manifest.place(entry.index).exists():
                    return None
        return manifest if manifest.tokenizer_path.exists() else None
    except ShardFormatError:
        return None
