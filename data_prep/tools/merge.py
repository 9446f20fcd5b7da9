"""Joins what was built apart: the jobs of one build, or finished folders with sources of their own.

The jobs of an array share one plan, so their result is that of a single job, with duplicates
dropped (`merge_jobs`). Finished folders were planned apart; they are joined when no document is in
two of them. Their files are linked instead of copied where the file system can.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_prep.build.encode import load_record
from data_prep.build.plan import DROPPED, Corpus, find_repeated, plan_build
from data_prep.build.report import Finished, finish_build
from data_prep.build.state import STATE_NAME, BuildState, finished_manifest, load_state
from data_prep.jobs.progress import Progress, say
from xlstm_io.errors import PrepError
from xlstm_io.shards.manifest import (
    MANIFEST_NAME,
    Manifest,
    load_manifest,
    place_of,
    write_manifest,
)
from xlstm_io.shards.shard import check_size
from xlstm_io.storage import temporary_path
from xlstm_io.terminal import counted
from xlstm_io.tokenizer import open_tokenizer

_SAME = ("dtype", "seq_len", "packing", "labels", "block_rows", "bos_id", "eos_id", "pad_id")


def merge(out: Path, inputs: list[Path], *, allow_duplicates: bool = False) -> Manifest:
    """Without `inputs`: finish the build that several jobs shared. With: join these into `out`.

    Args:
        out: folder of the build, or a new folder.
        inputs: finished folders with equal formats, tokenizers and validation shares.
        allow_duplicates: join even if documents are in two folders, or cannot be compared.

    Raises:
        PrepError: folders that do not fit together, or unfinished ones.
    """
    if not inputs:
        return merge_jobs(out)
    if len(inputs) < 2:
        raise PrepError("--inputs: name at least two folders to join")
    manifests = [load_manifest(folder) for folder in inputs]
    _check_equal(inputs, manifests)
    if not allow_duplicates:
        _check_distinct(inputs, manifests)
    parts = [json.loads((manifest.root / MANIFEST_NAME).read_bytes()) for manifest in manifests]
    hashes = [manifest.hash for manifest in manifests]
    fields = {
        **parts[0],
        "sources": [source for part in parts for source in part["sources"]],
        "config_hash": hashlib.sha256(json.dumps(hashes).encode()).hexdigest(),
    }
    if (out / MANIFEST_NAME).exists():
        if load_manifest(out).config_hash == fields["config_hash"]:
            say(f"{out} is finished: nothing to do")
            return load_manifest(out)
        raise PrepError(f"{out} holds other shards; nothing was overwritten: choose another folder")
    entries = [
        (manifest.root, entry)
        for manifest in manifests
        for split in ("train", "valid")
        for entry in manifest.shards(split)
    ]
    with Progress("link", sum(entry.bytes for _, entry in entries)) as progress:
        done = 0
        for root, entry in entries:
            check_size(root, entry)
            for name in (entry.path, entry.index):
                _link(place_of(root, name), place_of(out, name))
            done += entry.bytes
            progress.set(done)
    for file in manifests[0].tokenizer_files():
        _link(file, place_of(out, f"tokenizer/{file.name}"))
    manifest = write_manifest(out, fields)
    names = ", ".join(source.name for source in manifest.sources)
    say(
        f"{out}: {counted(len(entries), 'shard')} of the sources {names}; hash {manifest.hash[:12]}"
    )
    return manifest


def _check_equal(inputs: list[Path], manifests: list[Manifest]) -> None:
    for (a, first), (b, second) in pairwise(zip(inputs, manifests, strict=True)):
        problems = [
            f"{name} {getattr(first, name)} and {getattr(second, name)}"
            for name in (*_SAME, "tokenizer_sha256", "valid_fraction")
            if getattr(first, name) != getattr(second, name)
        ]
        if problems:
            raise PrepError(
                f"{a} and {b} do not fit together: {', '.join(problems)}; build them alike "
                "(`repack` changes seq_len and packing)"
            )
    names = [source.name for manifest in manifests for source in manifest.sources]
    if len(set(names)) < len(names):
        raise PrepError(
            f"the sources {', '.join(names)} must have names of their own; build with --source NAME"
        )


def _check_distinct(inputs: list[Path], manifests: list[Manifest]) -> None:
    total = sum(entry.docs for m in manifests for s in ("train", "valid") for entry in m.shards(s))

    def numbered() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        first = 0
        for folder in inputs:
            for hashes in kept_hashes(folder):
                yield np.arange(first, first + len(hashes)), hashes
                first += len(hashes)

    remedy = (
        "build the corpora together (`sources` in prep.yaml), which keeps the first of equal "
        "documents, or join them as they are with --allow-duplicates"
    )
    try:
        work = manifests[0].root / "_work"
        repeated = sum(len(part) for part in find_repeated(numbered(), total, work))
    except PrepError as error:
        raise PrepError(f"duplicates cannot be looked for: {error}; {remedy}") from None
    if repeated:
        raise PrepError(f"{repeated} of {total} documents are in an earlier folder too; {remedy}")


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none; appears at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def merge_jobs(out: Path) -> Manifest:
    """Write the manifest of a build that several jobs shared, once all its shards are there.

    Raises:
        PrepError: no build there, or shards are missing (which, and what to run).
    """
    state = load_state(out)
    if state is None:
        raise PrepError(
            f"{out}: no build was begun there ({out / '_work' / STATE_NAME} is missing)"
        )
    manifest = finished_manifest(out)
    if manifest is not None:
        say(f"{out} is finished: nothing to do")
        return manifest
    tokenizer = open_tokenizer(out / "tokenizer")
    corpus = stored_corpus(out, state)
    if corpus is None:
        raise PrepError(f"{out}: scans in {out / '_work/scan'} are gone; run the build again")
    shards = corpus.plan.shards
    stored = [load_record(out, shard) for shard in shards]
    records = [record for record in stored if record is not None]
    missing = [number for number, record in enumerate(stored) if record is None]
    if missing:
        numbers = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise PrepError(
            f"{out}: {len(missing)} of {len(shards)} shards are not finished (numbers {numbers}); "
            "job t of n writes the numbers t, t + n, ...: run those jobs again (--task t --tasks "
            "n), or the build with --tasks 1, which does what is left"
        )
    finished = Finished(
        state.build_config, tokenizer, state.settings, corpus, records, seconds={}, bytes_done=0
    )
    return finish_build(out, finished)


def stored_corpus(out: Path, state: BuildState) -> Corpus | None:
    """Input files and plan of a build as its state has them; None if scans are gone."""
    stored = state.stored_scans(out)
    scans = [scan for scan in stored if scan is not None]
    if len(scans) < len(stored):
        return None
    return plan_build(out, state.build_config, state.input_files(), state.fingerprints, scans)


def kept_hashes(out: Path) -> Iterator[np.ndarray]:
    """Hashes uint64 [n, 2] of the documents in a finished build, file after file.

    Raises:
        PrepError: the build state is not there (the folder was repacked or joined, or `_work` was
            deleted).
    """
    state = load_state(out)
    corpus = None if state is None else stored_corpus(out, state)
    if corpus is None:
        raise PrepError(f"{out} does not say which documents it holds (_work is gone)")
    assignments = np.fromfile(corpus.plan.assignments, np.uint8)
    first = 0
    for scan in corpus.scans:
        yield scan.rows()["hash"][assignments[first : first + scan.documents] != DROPPED]
        first += scan.documents
