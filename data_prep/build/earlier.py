"""What a build knows of the folder that it extends, kept in `OUT/_work`.

That is its manifest, the fingerprints of its input files, and the hashes of its documents. So the
result can be extended in turn, and the old folder and its texts may go.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from data_prep.build.notes import check_note, file_hash, write_note
from xlstm_io.errors import PrepError
from xlstm_io.foreign.json_file import StrictModel, checked, read_json
from xlstm_io.foreign.untrusted import LIMITS
from xlstm_io.shards.manifest import MANIFEST_NAME, Manifest
from xlstm_io.storage import file_size, replacing, write_atomic

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
    sound = size == note.documents * _HASH_BYTES and file_hash(work / _HASHES) == note.hashes_xxh3
    if not sound or manifest.hash != note.hash:
        raise PrepError(f"{work}: what is known of the extended folder is damaged; {remedy}")
    return Earlier(manifest.at(out), note.stamps, work / _HASHES, note.documents)


def store_hashes(out: Path, parts: Iterable[np.ndarray]) -> None:
    """Keep the hashes of the documents of a folder that a build in `out` will extend.

    Args:
        out: the new folder.
        parts: the hashes, uint64 [n, 2] each.
    """
    (out / "_work").mkdir(parents=True, exist_ok=True)
    with replacing(out / "_work" / _HASHES) as file:
        for hashes in parts:
            file.write(np.ascontiguousarray(hashes).tobytes())


def store_earlier(out: Path, manifest: Manifest, stamps: list[list[Any]]) -> None:
    """Note that a build in `out` extends a folder whose hashes are stored and shards are there."""
    work = out / "_work"
    write_atomic(work / _MANIFEST, (manifest.root / MANIFEST_NAME).read_bytes())
    note = {
        "hash": manifest.hash,
        "stamps": stamps,
        "documents": file_size(work / _HASHES) // _HASH_BYTES,
        "hashes_xxh3": file_hash(work / _HASHES),
    }
    write_note(work / _NOTE, note)
