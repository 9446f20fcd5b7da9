"""Adding files to a finished build: its shards stay, byte for byte, and only new files are built.

The result is a folder of its own. The old shards are hard links in it (copies where the file system
has none), the new ones count on, and the manifest names its parent. So a run on the old folder goes
on undisturbed, and no text of the old folder changes its split. A text that the old folder holds is
a duplicate in the new files.

What is needed of the old folder is kept in `OUT/_work`: its manifest, the fingerprints of its input
files, and the hashes of its documents. So the result can be extended in turn, and the old folder
and its texts may go.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import xxhash
from pydantic import Field

from data_prep.build.notes import check_note, write_note
from data_prep.build.plan import DROPPED, Corpus, plan_build
from data_prep.build.scan import InputFile
from data_prep.build.state import STATE_NAME, BuildState, load_state
from data_prep.config import BuildConfig
from data_prep.jobs.progress import Progress, say
from data_prep.sources.files import file_fingerprint
from xlstm_io.errors import PrepError
from xlstm_io.foreign.json_file import StrictModel, checked, read_json
from xlstm_io.foreign.untrusted import LIMITS
from xlstm_io.shards.manifest import MANIFEST_NAME, Manifest, load_manifest, place_of
from xlstm_io.shards.shard import check_size, entry_is_there
from xlstm_io.storage import absolute, file_size, replacing, temporary_path, write_atomic
from xlstm_io.terminal import counted

_NOTE, _MANIFEST, _HASHES = "earlier.json", "earlier.manifest.json", "earlier.hashes"
_HASH_BYTES = 16


class _EarlierNote(StrictModel):
    """What is noted about the folder that a build extends."""

    hash: str
    stamps: list[Annotated[list[int | str | None], Field(min_length=3, max_length=3)]]
    documents: Annotated[int, Field(ge=1)]
    hashes_xxh3: str


@dataclass(frozen=True)
class Earlier:
    """The folder that a build extends, as the build state keeps it.

    Attributes:
        manifest: its manifest; `root` is that of the new folder, where its shards are, too.
        stamps: fingerprints of its input files, and of those that it extends itself.
        hashes: file with the hash of each of its documents, two uint64 each.
        documents: how many they are.
    """

    manifest: Manifest
    stamps: list[list[Any]]
    hashes: Path
    documents: int

    def document_hashes(self) -> np.ndarray:
        """Uint64 `[documents, 2]`, mapped from disk."""
        return np.memmap(self.hashes, np.uint64, "r", shape=(self.documents, 2))

    def shard_counts(self) -> dict[tuple[str, str], int]:
        """How many shards each split of each source has."""
        return {
            (source.name, name): len(split.shards)
            for source in self.manifest.sources
            for name, split in source.splits.items()
        }


def load_earlier(out: Path) -> Earlier | None:
    """What a build in `out` extends; None if it extends nothing.

    Raises:
        PrepError: it is damaged.
    """
    work = out / "_work"
    remedy = f"delete {out} or choose another --out"
    try:
        note = check_note(_EarlierNote, work / _NOTE, error=PrepError)
        fields = read_json(work / _MANIFEST, LIMITS.shard_manifest, error=PrepError)
        size = file_size(work / _HASHES)
    except FileNotFoundError:
        if (work / _NOTE).exists():
            raise PrepError(f"{work}: files of what is extended are gone; {remedy}") from None
        return None
    manifest = checked(Manifest, fields, named_in=work / _MANIFEST, remedy=remedy, error=PrepError)
    sound = size == note.documents * _HASH_BYTES and _hash_of(work / _HASHES) == note.hashes_xxh3
    if not sound or manifest.hash != note.hash:
        raise PrepError(f"{work}: what is known of the extended folder is damaged; {remedy}")
    manifest._root = absolute(out)
    return Earlier(manifest, note.stamps, work / _HASHES, note.documents)


def _hash_of(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def take_over(out: Path, config: BuildConfig, settings: dict[str, Any]) -> Earlier:
    """Link the shards of `config.extends` into `out` and note what the build needs to know of it.

    Args:
        out: the new folder.
        config: of the build.
        settings: what shards depend on, besides the corpus; they must be those of the folder.

    Raises:
        PrepError: the folder was not built by this command, has other settings, or `out` extends
            another one.
    """
    known, folder = load_earlier(out), Path(config.extends)
    if known is not None and not (folder / MANIFEST_NAME).exists():
        return known
    manifest = load_manifest(folder)
    if known is not None:
        if known.manifest.hash != manifest.hash:
            raise PrepError(f"{out} extends another folder than {folder}; choose another --out")
        return known
    if (out / "_work" / STATE_NAME).exists() and absolute(folder) != absolute(out):
        raise PrepError(f"{out} holds a build that does not extend {folder}; choose another --out")
    if absolute(folder) == absolute(out):
        raise PrepError(f"--extends {folder} is --out; a run may use it: choose another --out")
    state = load_state(folder)
    if state is None:
        raise PrepError(
            f"--extends {folder}: its build state (_work) is gone, or it was merged or repacked; "
            "extend the folder that `build` wrote"
        )
    _check_settings(folder, state.settings, settings)
    before = load_earlier(folder)
    stamps = [*(before.stamps if before else []), *state.fingerprints]
    (out / "_work").mkdir(parents=True, exist_ok=True)
    documents, digest = 0, xxhash.xxh3_128()
    with replacing(out / "_work" / _HASHES) as file:
        for hashes in kept_hashes(folder):
            data = np.ascontiguousarray(hashes).tobytes()
            documents += len(hashes)
            digest.update(data)
            file.write(data)
    _link_shards(out, manifest)
    write_atomic(out / "_work" / _MANIFEST, (manifest.root / MANIFEST_NAME).read_bytes())
    note = {"hash": manifest.hash, "stamps": stamps, "documents": documents}
    write_note(out / "_work" / _NOTE, {**note, "hashes_xxh3": digest.hexdigest()})
    earlier = load_earlier(out)
    assert earlier is not None
    return earlier


def _check_settings(folder: Path, stored: dict[str, Any], settings: dict[str, Any]) -> None:
    problems = [
        f"{key} {stored.get(key)} -> {value}"
        for key, value in settings.items()
        if key not in ("sources", "extends") and stored.get(key) != value
    ]
    old, new = stored.get("sources", {}), settings["sources"]
    problems += [
        f"source {name}: {old[name]} -> {new[name]}"
        for name in old.keys() & new.keys()
        if old[name] != new[name]
    ]
    if problems:
        raise PrepError(
            f"--extends {folder}: it has other settings ({', '.join(problems)}); use the same, or "
            "build anew"
        )


def _link_shards(out: Path, manifest: Manifest) -> None:
    entries = [entry for split in manifest.split_names() for entry in manifest.shards(split)]
    with Progress("link", sum(entry.bytes for entry in entries)) as progress:
        done = 0
        for entry in entries:
            check_size(manifest.root, entry)
            if not entry_is_there(out, entry):
                for name in (entry.path, entry.index):
                    link_file(place_of(manifest.root, name), place_of(out, name))
            done += entry.bytes
            progress.set(done)
    say(f"{out}: {counted(len(entries), 'shard')} of {manifest.root} taken over as they are")


def link_file(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none; appears at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def new_files(earlier: Earlier, files: list[InputFile], folder: str) -> list[InputFile]:
    """Those of the input files that the extended folder does not have.

    Raises:
        PrepError: there are none, or a file of the folder has changed.
    """
    known = {stamp[0]: stamp[1:] for stamp in earlier.stamps}
    chosen = []
    for file in files:
        path, *rest = file_fingerprint(file.path)
        if path not in known:
            chosen.append(file)
        elif known[path] != rest:
            raise PrepError(
                f"{file.path} has changed since {folder} was built, whose shards stay as they are; "
                "put new texts into new files, or build without --extends"
            )
    if not chosen:
        raise PrepError(f"--extends {folder}: it has all files of --input; there is nothing to add")
    if len(chosen) < len(files):
        say(f"{folder} has {counted(len(files) - len(chosen), 'file')} of --input already")
    return chosen


def stored_corpus(out: Path, state: BuildState) -> Corpus | None:
    """Input files and plan of a build as its state has them; None if scans are gone."""
    stored = state.stored_scans(out)
    scans = [scan for scan in stored if scan is not None]
    if len(scans) < len(stored):
        return None
    earlier = load_earlier(out)
    config, files = state.build_config, state.input_files()
    if earlier is None:
        return plan_build(out, config, files, state.fingerprints, scans)
    hashes, counts = earlier.document_hashes(), earlier.shard_counts()
    return plan_build(out, config, files, state.fingerprints, scans, hashes, counts)


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
    earlier = load_earlier(out)
    if earlier is not None:
        yield earlier.document_hashes()
    assignments = np.fromfile(corpus.plan.assignments, np.uint8)
    first = 0
    for scan in corpus.scans:
        yield scan.rows()["hash"][assignments[first : first + scan.documents] != DROPPED]
        first += scan.documents
