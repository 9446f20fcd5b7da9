"""Adding files to a finished build: its shards stay, byte for byte, and only new files are built.

The result is a folder of its own. The old shards are hard links in it (copies where the file system
has none), the new ones count on, and the manifest names its parent. So a run on the old folder goes
on undisturbed, and no text of the old folder changes its split. A text that the old folder holds is
a duplicate in the new files.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.build.earlier import Earlier, load_earlier, store_earlier, store_hashes
from data_prep.build.plan import DROPPED, Corpus, plan_build
from data_prep.build.scan import InputFile
from data_prep.build.state import STATE_NAME, BuildState, load_state
from data_prep.config import BuildConfig
from data_prep.jobs.progress import Progress, say
from data_prep.sources.files import file_fingerprint
from xlstm_io.errors import PrepError
from xlstm_io.shards.manifest import MANIFEST_NAME, Manifest, load_manifest, place_of
from xlstm_io.shards.shard import check_size, entry_is_there
from xlstm_io.storage import absolute, temporary_path
from xlstm_io.terminal import counted


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
    if known is not None:  # the folder itself may be gone
        there = (folder / MANIFEST_NAME).exists()
        if there and load_manifest(folder).hash != known.manifest.hash:
            raise PrepError(f"{out} extends another folder than {folder}; choose another --out")
        return known
    manifest = load_manifest(folder)
    if absolute(folder) == absolute(out):
        raise PrepError(f"--extends {folder} is --out; a run may use it: choose another --out")
    if (out / "_work" / STATE_NAME).exists():
        raise PrepError(f"{out} holds a build that does not extend {folder}; choose another --out")
    state = load_state(folder)
    if state is None:
        raise PrepError(
            f"--extends {folder}: its build state (_work) is gone, or it was merged or repacked; "
            "extend the folder that `build` wrote"
        )
    _check_settings(folder, state.settings, settings)
    before = load_earlier(folder)
    stamps = [*(before.stamps if before else []), *state.fingerprints]
    store_hashes(out, kept_hashes(folder))
    _link_shards(out, manifest)
    store_earlier(out, manifest, stamps)
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
    entries = manifest.all_shards()
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
    files, stamps = state.input_files(), state.fingerprints
    return plan_build(out, state.build_config, files, stamps, scans, load_earlier(out))


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
    if corpus.earlier is not None:
        yield corpus.earlier.document_hashes()
    assignments = np.fromfile(corpus.plan.assignments, np.uint8)
    first = 0
    for scan in corpus.scans:
        yield scan.rows()["hash"][assignments[first : first + scan.documents] != DROPPED]
        first += scan.documents
