"""The plan of a build as a value, and as a note of the build state."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data_prep.build.notes import file_hash, read_note, write_note
from data_prep.build.scan import FileScan, InputFile
from xlstm_io.foreign.json_file import StrictModel
from xlstm_io.shards.manifest import Count


@dataclass(frozen=True)
class ShardPlan:
    """One shard: of each file, the rows of its scan from `first` up to `last`.

    Among them are the shard's documents: those that are assigned to its split.

    Attributes:
        source: name of the source.
        split: "train" or "valid".
        number: from 0, within source and split.
        documents: how many it holds.
        bytes_in: UTF-8 bytes of their texts.
        parts: (index into the files, first, last) of each file.
    """

    source: str
    split: str
    number: int
    documents: int
    bytes_in: int
    parts: list[tuple[int, int, int]]


@dataclass(frozen=True)
class CorpusPlan:
    """All shards, and what was left out and why.

    Attributes:
        shards: source after source, train before valid.
        documents_read: by source.
        dropped: documents that were left out, by source and reason.
        assignments: file with the split assignment of each document, file after file.
    """

    shards: list[ShardPlan]
    documents_read: dict[str, int]
    dropped: dict[str, dict[str, int]]
    assignments: str


def assignments_file(path: Path) -> Path:
    """The file of split assignments that belongs to the stored plan `path`."""
    return path.with_suffix(".fate")


class _ShardNote(StrictModel):
    """A stored `ShardPlan`."""

    source: str
    split: Literal["train", "valid"]
    number: Count
    documents: Count
    bytes_in: Count
    parts: list[Annotated[list[Count], Field(min_length=3, max_length=3)]]


class _PlanNote(StrictModel):
    """A stored `CorpusPlan`."""

    shards: list[_ShardNote]
    documents_read: dict[str, Count]
    dropped: dict[str, dict[str, Count]]
    assignments_xxh3: str


def load_plan(path: Path, files: list[InputFile], scans: list[FileScan]) -> CorpusPlan | None:
    """The plan stored at `path`; None where there is none for these files, or it is damaged."""
    note, file = read_note(_PlanNote, path), assignments_file(path)
    names = {source.source for source in files}
    if note is None or not names == note.documents_read.keys() == note.dropped.keys():
        return None
    for shard in note.shards:
        for number, first, last in shard.parts:
            inside = number < len(files) and first < last <= scans[number].documents
            if not inside or files[number].source != shard.source:
                return None
    try:
        total = sum(scan.documents for scan in scans)
        if file.stat().st_size != max(1, total) or file_hash(file) != note.assignments_xxh3:
            return None
    except OSError:
        return None
    shards = [ShardPlan(**{**vars(s), "parts": [tuple(p) for p in s.parts]}) for s in note.shards]
    return CorpusPlan(shards, note.documents_read, note.dropped, str(file))


def store_plan(path: Path, plan: CorpusPlan) -> None:
    """Note a plan whose split assignments are written."""
    fields = {key: value for key, value in asdict(plan).items() if key != "assignments"}
    write_note(path, {**fields, "assignments_xxh3": file_hash(Path(plan.assignments))})
