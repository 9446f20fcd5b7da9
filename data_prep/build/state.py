"""The state of a build in `OUT/_work`: what it was begun with, and what of it is there."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from data_prep.build.notes import check_note, create_note, write_note
from data_prep.build.scan import FileScan, InputFile, load_scan, scan_path
from data_prep.config import BuildConfig
from data_prep.sources.names import absolute
from xlstm_io.errors import PrepError, ShardFormatError
from xlstm_io.foreign.json_file import StrictModel
from xlstm_io.foreign.untrusted import LIMITS, inside
from xlstm_io.shards.manifest import Manifest, load_manifest
from xlstm_io.shards.shard import check_sizes

STATE_NAME = "build.json"
_STATE_BYTES, _STATE_VALUES = 100, 8  # of each file, besides its name


class BuildState(StrictModel):
    """What a build was begun with.

    Attributes:
        settings: what the contents of the shards depend on, besides the corpus.
        corpus: digest of all texts in order, see `plan.corpus_digest`.
        fingerprints: of each input file; `stamps` in the file.
        files: path and source of each input file, in the order of the plan.
        config: the whole configuration.
    """

    settings: dict[str, Any]
    corpus: str
    fingerprints: list[Annotated[list[int | str | None], Field(min_length=3, max_length=3)]] = (
        Field(alias="stamps")
    )
    files: list[Annotated[list[str], Field(min_length=2, max_length=2)]]
    config: dict[str, Any]

    @property
    def build_config(self) -> BuildConfig:
        """The configuration, checked."""
        # Older versions kept there whether functions may be run.
        known = {key: value for key, value in self.config.items() if key != "allow_functions"}
        return BuildConfig.model_validate(known)

    def input_files(self) -> list[InputFile]:
        """The input files, in the order of the plan."""
        fields = {source.name: source.fields for source in self.build_config.all_sources()}
        return [InputFile(path, source, fields[source]) for path, source in self.files]

    def stored_scans(self, out: Path) -> list[FileScan | None]:
        """The stored scan of each input file; None where it is gone."""
        filters, work = self.settings["filters"], out / "_work"  # as they were: nothing is imported
        pairs = zip(self.input_files(), self.fingerprints, strict=True)
        return [load_scan(scan_path(*pair, filters, work)) for pair in pairs]


def load_state(out: Path) -> BuildState | None:
    """The state of the build in `out`; None when no build was begun there.

    Raises:
        PrepError: the file is damaged, or a link leads out of the folder.
    """
    name = f"_work/{STATE_NAME}"
    path = inside(out, name, named_in=out, error=PrepError)
    try:
        state = check_note(BuildState, path, error=PrepError)
        if len(state.input_files()) != len(state.fingerprints):
            raise ValueError("a fingerprint for each file")
        if not all(isinstance(state.settings[key], dict) for key in ("filters", "sources")):
            raise ValueError("filters and sources with their values")
        return state
    except FileNotFoundError:
        return None
    except PrepError as error:
        raise PrepError(f"{error}; delete {out} or choose another --out") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PrepError(f"{path} is damaged; delete {out} or choose another --out") from None


def check_number_of_files(files: list[InputFile]) -> None:
    """Check, before they are scanned, that a build of so many files can be continued.

    Raises:
        PrepError: the state of the build, which names each file twice, could not be read again.
    """
    size = sum(2 * len(json.dumps(absolute(f.path))) + len(f.source) + _STATE_BYTES for f in files)
    if size > LIMITS.build_state or _STATE_VALUES * len(files) > LIMITS.json_values:
        raise PrepError(
            f"--input: {len(files):,} files, more than the state of a build can name; gather them "
            "in fewer by `python -m data_prep collect`, or as lines of JSON"
        )


def save_state(
    out: Path,
    config: BuildConfig,
    settings: dict[str, Any],
    corpus: str,
    files: list[InputFile],
    fingerprints: list[list],
) -> None:
    """Write the state of a build whose plan is made; later jobs and runs continue from it.

    Jobs that begin together may see different files: one that is still being copied, a list that
    was edited. The first one that comes here says what the folder holds.

    Raises:
        PrepError: `out` was begun with other settings or contents.
    """
    names = [[absolute(file.path), file.source] for file in files]
    stored = {
        "settings": settings,
        "corpus": corpus,
        "stamps": fingerprints,
        "files": names,
        "config": config.model_dump(),
    }
    path = out / "_work" / STATE_NAME
    try:
        create_note(path, stored)
        return
    except FileExistsError:
        begun = load_state(out)
    if begun is not None:
        check_same_settings(out, begun.settings, settings)
        if begun.corpus != corpus:
            raise PrepError(
                f"{out} was begun with other contents of --input; nothing was overwritten: choose "
                "another --out, or delete the folder"
            )
    write_note(path, stored)  # files may have got new times


def check_same_settings(out: Path, stored: dict[str, Any], settings: dict[str, Any]) -> None:
    """Check that `out` was begun with these settings.

    Raises:
        PrepError: it was not; the message lists the differences.
    """
    changed = [
        f"{key} {stored.get(key)} -> {value}"
        for key, value in {"extends": None, **settings}.items()
        if stored.get(key) != value
    ]
    if changed:
        raise PrepError(
            f"{out} holds shards of other settings ({', '.join(changed)}); nothing was "
            "overwritten: choose another --out, or delete the folder"
        )


def finished_manifest(out: Path) -> Manifest | None:
    """The manifest of a finished build whose shards are all there, else None."""
    try:
        manifest = load_manifest(out)
        entries = manifest.all_shards()
        check_sizes(manifest.root, entries)
        beside = [manifest.tokenizer_path, *(manifest.place(entry.index) for entry in entries)]
        return manifest if all(path.exists() for path in beside) else None
    except ShardFormatError:
        return None
