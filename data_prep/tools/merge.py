"""Joins what was built apart: the jobs of one build, or finished folders with sources of their own.

The jobs of an array share one plan, so their result is that of a single job, with duplicates
dropped (`merge_jobs`). Finished folders were planned apart; they are joined when no document is in
two of them. Their files are linked instead of copied where the file system can.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_prep.build.encode import load_record
from data_prep.build.extend import kept_hashes, link_file, stored_corpus
from data_prep.build.plan import check_splits
from data_prep.build.repeated import find_repeated
from data_prep.build.report import Finished, finish_build
from data_prep.build.state import STATE_NAME, finished_manifest, load_state
from data_prep.jobs.progress import Progress, say
from xlstm_io.errors import PrepError
from xlstm_io.shards.manifest import (
    MANIFEST_NAME,
    SOURCE_NAME,
    Manifest,
    load_manifest,
    place_of,
    write_manifest,
)
from xlstm_io.shards.shard import check_size
from xlstm_io.storage import remove_temporaries
from xlstm_io.terminal import counted
from xlstm_io.tokenizer import open_tokenizer

_SAME = ("dtype", "seq_len", "packing", "labels", "block_rows", "bos_id", "eos_id", "pad_id")


def merge(
    out: Path,
    inputs: list[Path],
    *,
    allow_duplicates: bool = False,
    rename: Sequence[str] = (),
) -> Manifest:
    """Without `inputs`: finish the build that several jobs shared. With: join these into `out`.

    Args:
        out: folder of the build, or a new folder.
        inputs: finished folders with equal formats, tokenizers and validation shares.
        allow_duplicates: join even if documents are in two folders, or cannot be compared.
        rename: `OLD=NEW`, or `FOLDER/OLD=NEW` for a source of one of `inputs`.

    Raises:
        PrepError: folders that do not fit together, or unfinished ones.
    """
    if not inputs:
        if rename:
            raise PrepError(
                "--rename needs --inputs; a folder keeps the names that it was built with"
            )
        return merge_jobs(out)
    if len(inputs) < 2 and not rename:
        raise PrepError("--inputs: name at least two folders to join, or one with --rename")
    manifests = [load_manifest(folder) for folder in inputs]
    names = _new_names(inputs, manifests, rename)
    _check_equal(inputs, manifests, names)
    if len(inputs) > 1 and not allow_duplicates:
        _check_distinct(inputs, manifests, out)
    parts = [manifest.model_dump(exclude={"parent"}) for manifest in manifests]
    for part, renamed in zip(parts, names, strict=True):
        for source in part["sources"]:
            new = renamed[source["name"]]
            for entry in (e for split in source["splits"].values() for e in split["shards"]):
                entry["path"], entry["index"] = (
                    _moved(entry[key], source["name"], new) for key in ("path", "index")
                )
            source["name"] = new
    hashes = [manifest.hash for manifest in manifests]
    if rename:
        hashes += [json.dumps(names, sort_keys=True)]
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
        (manifest.root, entry, source.name, renamed[source.name])
        for manifest, renamed in zip(manifests, names, strict=True)
        for source in manifest.sources
        for split in source.splits.values()
        for entry in split.shards
    ]
    with Progress("link", sum(entry.bytes for _, entry, _, _ in entries)) as progress:
        done = 0
        for root, entry, old, new in entries:
            check_size(root, entry)
            for name in (entry.path, entry.index):
                link_file(place_of(root, name), place_of(out, _moved(name, old, new)))
            done += entry.bytes
            progress.set(done)
    for file in manifests[0].tokenizer_files():
        link_file(file, place_of(out, f"tokenizer/{file.name}"))
    remove_temporaries(out)
    manifest = write_manifest(out, fields)
    joined = ", ".join(source.name for source in manifest.sources)
    shards = counted(len(entries), "shard")
    say(f"{out}: {shards} of the sources {joined}; hash {manifest.hash[:12]}")
    return manifest


def _new_names(
    inputs: list[Path], manifests: list[Manifest], rename: Sequence[str]
) -> list[dict[str, str]]:
    """For each input {name of a source: its name in the new folder}.

    Raises:
        PrepError: a word is not OLD=NEW, a source is not there, or a name is not usable.
    """
    wanted = {}
    for word in rename:
        old, separator, new = word.partition("=")
        if not separator or not re.fullmatch(SOURCE_NAME, new) or new == "tokenizer":
            raise PrepError(
                f"--rename {word}: write OLD=NEW, and in NEW letters, digits, '.', '_' and '-', "
                "but not 'tokenizer'"
            )
        wanted[old] = new
    used = set()
    names = []
    for folder, manifest in zip(inputs, manifests, strict=True):
        found = {}
        for source in manifest.sources:
            keys = (f"{folder}/{source.name}", source.name)
            key = next((key for key in keys if key in wanted), None)
            found[source.name] = source.name if key is None else wanted[key]
            used.add(key)
        names.append(found)
    unknown = [old for old in wanted if old not in used]
    if unknown:
        there = ", ".join(sorted({source for found in names for source in found}))
        raise PrepError(f"--rename {unknown[0]}: there is no such source; there are {there}")
    return names


def _moved(path: str, old: str, new: str) -> str:
    """The path of a file of the source `old` that is called `new`."""
    return new + path.removeprefix(old) if path.startswith(f"{old}/") else f"{new}/{path}"


def _check_equal(
    inputs: list[Path], manifests: list[Manifest], renamed: list[dict[str, str]]
) -> None:
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
    names = [new for found in renamed for new in found.values()]
    if len(set(names)) < len(names):
        raise PrepError(
            f"the sources {', '.join(names)} must have names of their own; give them by --rename "
            f"{inputs[-1]}/{names[-1]}=NEW"
        )


def _check_distinct(inputs: list[Path], manifests: list[Manifest], out: Path) -> None:
    total = sum(entry.docs for manifest in manifests for entry in manifest.all_shards())

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
        # Beside `out`, as the inputs may be others' folders and `out` is not there yet.
        repeated = sum(
            len(part) for part in find_repeated(numbered(), total, out.absolute().parent)
        )
    except PrepError as error:
        raise PrepError(f"duplicates cannot be looked for: {error}; {remedy}") from None
    if repeated:
        raise PrepError(f"{repeated} of {total} documents are in an earlier folder too; {remedy}")


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
    check_splits(corpus.plan, state.build_config)
    shards = corpus.plan.shards
    stored = [load_record(out, shard) for shard in shards]
    records = [record for record in stored if record is not None]
    missing = [number for number, record in enumerate(stored) if record is None]
    if missing:
        numbers = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise PrepError(
            f"{out}: {len(missing)} of {len(shards)} shards are not finished (numbers {numbers}); "
            "run the jobs that did not end well again (--task t --tasks n), or the build with "
            "--tasks 1, which does what is left"
        )
    config, settings = state.build_config, state.settings
    return finish_build(out, Finished(config, tokenizer, settings, corpus, records, {}, 0))
