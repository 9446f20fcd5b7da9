"""The manifest of a shard folder: what the shards are, checked when read, written last.

A folder without `manifest.json` is an unfinished build: readers trust nothing else. Two digests
guard it. `checksum` covers the whole document, so a flipped bit is noticed. `hash` names the
*data* (everything but the version of the code that wrote it): checkpoints store it, and a run
resumes only on data of the same hash.
"""

import hashlib
import json
import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from xlstm_io.errors import ShardFormatError
from xlstm_io.foreign.json_file import StrictModel, checked, read_json, without_collections
from xlstm_io.foreign.untrusted import LIMITS, check_names, inside
from xlstm_io.storage import absolute, write_atomic
from xlstm_io.terminal import shortened
from xlstm_io.tokenizer.base import TOKENIZER_FILES

MANIFEST_NAME = "manifest.json"
FORMAT = "xtok-wds"
VERSION = 1


# A petabyte; sums over all shards stay below 2^63.
Count = Annotated[int, Field(ge=0, lt=1 << 50)]
# Patterns, which pydantic matches without a call of Python: a manifest has two for each shard.
Xxh3 = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _train_or_valid(text: str) -> str:
    if text not in ("train", "valid"):
        raise ValueError("must be train or valid")
    return text


SplitName = Annotated[str, AfterValidator(_train_or_valid)]
# It is part of the shards' paths.
SOURCE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
SourceName = Annotated[str, Field(pattern=SOURCE_NAME, max_length=200)]


class ShardEntry(StrictModel):
    """One tar of blocks. `path` and `index` are relative to the manifest's folder."""

    path: str
    index: str
    rows: Count
    tokens: Count
    """Document tokens with bos and eos; neither the overlap between rows nor padding counts."""
    targets: Count
    """Positions that the loss counts: one less than the tokens of each document, or the labels."""
    pad_tokens: Count
    docs: Count
    bytes_in: Count
    """UTF-8 bytes of the documents' texts."""
    bytes: Count
    """Size of the tar."""
    xxh3: Xxh3
    index_xxh3: Xxh3


class SplitEntry(StrictModel):
    """Totals of a split of one source, and its shards in row order."""

    rows: Count
    tokens: Count
    targets: Count
    pad_tokens: Count
    docs: Count
    bytes_in: Count
    shards: list[ShardEntry]


TOTALS = tuple(name for name in SplitEntry.model_fields if name != "shards")
"""Fields of a split that are the sums of its shards'."""


def split_fields(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields of a `SplitEntry`, from those of its shards."""
    return {**{name: sum(shard[name] for shard in shards) for name in TOTALS}, "shards": shards}


class SourceEntry(StrictModel):
    """One named corpus; `provenance` is its licence and origin note, where one was given."""

    name: SourceName
    provenance: dict[str, Any] | None
    documents_read: Count
    dropped: dict[str, Count]
    """Documents that were left out, by reason (duplicate, empty, malformed, filters by name)."""
    filters: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the filters that were applied, by name."""
    splits: dict[SplitName, SplitEntry]


class TokenizerEntry(StrictModel):
    """The tokenizer that made the ids; `path` is relative to the manifest's folder."""

    type: Literal["sentencepiece", "huggingface", "symbols"]
    path: str
    sha256: Sha256
    vocab_size: Annotated[int, Field(ge=1, le=1 << 24)]


class Manifest(StrictModel):
    """`manifest.json`. Obtain one with `load_manifest`, which checks it."""

    version: Literal[1]
    format: Literal["xtok-wds"]
    dtype: Literal["uint16", "uint32"]
    seq_len: Annotated[int, Field(ge=1, le=1 << 26)]
    row_tokens: int
    """Tokens stored per row: seq_len + 1; neighbouring rows of concat share one token."""
    block_rows: Annotated[int, Field(ge=1, le=1 << 32)]
    packing: Literal["concat", "best_fit"]
    add_bos: bool
    add_eos: bool
    bos_id: Count
    eos_id: Count
    pad_id: Count
    tokenizer: TokenizerEntry
    valid_fraction: Annotated[float, Field(ge=0.0, le=1.0)]
    labels: bool = False
    """Whether every block has a `.lab` member: labels of its own instead of the next tokens."""
    config_hash: str
    sources: Annotated[list[SourceEntry], Field(max_length=10_000)]
    parent: Sha256 | None = None
    """The `hash` of the folder that this one extends (`build --extends`)."""
    code: dict[str, str]
    hash: Sha256
    checksum: Sha256

    _root: Path = PrivateAttr(default=Path("."))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if self.row_tokens != self.seq_len + 1:
            problems.append(f"row_tokens={self.row_tokens} must be seq_len + 1={self.seq_len + 1}")
        for name in ("bos_id", "eos_id", "pad_id"):
            if getattr(self, name) >= self.vocab_size:
                problems.append(
                    f"{name}={getattr(self, name)} must be below vocab_size={self.vocab_size}"
                )
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            problems.append("the names of the sources must differ")
        row_bytes = self.row_tokens * (2 if self.dtype == "uint16" else 4)
        for entry in self.all_shards():
            if entry.rows * row_bytes > entry.bytes:
                problems.append(f"{entry.path}: {entry.rows} rows in {entry.bytes} bytes")
        if problems:
            raise ValueError("; ".join(problems[:3]))
        return self

    @property
    def root(self) -> Path:
        """Absolute folder that the manifest's relative paths start from."""
        return self._root

    def at(self, root: Path) -> Self:
        """The manifest of the same files in another folder."""
        other = self.model_copy()
        other._root = absolute(root)
        return other

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    @property
    def tokenizer_sha256(self) -> str:
        """SHA-256 of the tokenizer file (hex)."""
        return self.tokenizer.sha256

    @property
    def tokenizer_path(self) -> Path:
        """Absolute path of the tokenizer's file: a `.model`, or a `tokenizer.json`."""
        return self.place(self.tokenizer.path)

    def tokenizer_files(self) -> list[Path]:
        """Absolute paths of the tokenizer's file and of what lies beside it.

        Raises:
            ShardFormatError: a link leads from one of them out of the folder.
        """
        path = PurePosixPath(self.tokenizer.path)
        names = sorted({path.name, *TOKENIZER_FILES})
        places = [self.place((path.parent / name).as_posix()) for name in names]
        return [place for place in places if place.is_file()]

    def place(self, name: str) -> Path:
        """Absolute path of a file that the manifest names.

        Raises:
            ShardFormatError: a link leads from it out of the folder.
        """
        return place_of(self._root, name)

    def split_names(self) -> list[str]:
        """Names of the splits, each once."""
        return list(dict.fromkeys(name for source in self.sources for name in source.splits))

    def shards(self, split: str) -> list[ShardEntry]:
        """All shards of a split, over all sources, in row order (empty where there are none)."""
        parts = (source.splits.get(split) for source in self.sources)
        return [shard for part in parts if part is not None for shard in part.shards]

    def all_shards(self) -> list[ShardEntry]:
        """All shards of all splits, split after split."""
        return [entry for split in self.split_names() for entry in self.shards(split)]


def place_of(root: Path, name: str) -> Path:
    """The place in `root` of a file that its manifest names, to be read or written.

    Raises:
        ShardFormatError: the name is not relative, or a link leads from it out of the folder.
    """
    return inside(root, name, named_in=root / MANIFEST_NAME, error=ShardFormatError)


def _digest(fields: dict[str, Any], *without: str) -> str:
    kept = {key: value for key, value in fields.items() if key not in without}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


_NOT_DATA = ("code", "hash", "checksum")  # of a manifest's fields


def data_hash(root: Path) -> str:
    """What `hash` of the manifest in `root` must be; `load_manifest` has checked the file."""
    fields = read_json(root / MANIFEST_NAME, LIMITS.shard_manifest, links=True)
    return _digest(fields, *_NOT_DATA)


def write_manifest(root: Path, fields: dict[str, Any]) -> Manifest:
    """Complete `fields` with version, format and digests; write the manifest atomically.

    Must be the last thing that a build writes.
    """
    fields = {"version": VERSION, "format": FORMAT, **fields}
    fields["hash"] = _digest(fields, *_NOT_DATA)
    fields["checksum"] = _digest(fields, "checksum")
    manifest = Manifest.model_validate(fields)
    write_atomic(root / MANIFEST_NAME, json.dumps(fields, indent=1).encode() + b"\n")
    manifest._root = absolute(root)
    return manifest


@without_collections()
def load_manifest(path: str | os.PathLike) -> Manifest:
    """Read and check the manifest of a shard folder (`path`: the folder or the file itself).

    Raises:
        ShardFormatError: nothing there, an unfinished build, another format, or altered bytes.
    """
    path = Path(path)
    file = path if path.name == MANIFEST_NAME else path / MANIFEST_NAME
    if not file.parent.is_dir():
        raise ShardFormatError(
            f"{file.parent} is not a folder of shards; build one with `python -m data_prep build`"
        )
    remedy = (
        "restore it, or delete it and run `python -m data_prep build` again, which keeps "
        "finished shards"
    )
    try:
        fields = read_json(
            file, LIMITS.shard_manifest, remedy=remedy, links=True, error=ShardFormatError
        )
    except FileNotFoundError:
        raise ShardFormatError(
            f"{file} does not exist: the build is unfinished or this is another folder; "
            "run `python -m data_prep build` (again) with this --out, it keeps finished shards"
        ) from None
    if fields.get("format") != FORMAT or fields.get("version") != VERSION:
        raise ShardFormatError(
            f"{file} has format={shortened(fields.get('format'))} "
            f"version={shortened(fields.get('version'))}; "
            f"this code reads format={FORMAT!r} version={VERSION}; rebuild the shards"
        )
    try:
        unchanged = fields.get("checksum") == _digest(fields, "checksum")
    except RecursionError:
        unchanged = False
    if not unchanged:
        raise ShardFormatError(
            f"{file} does not match its checksum: it was edited or damaged; {remedy}"
        )
    manifest = checked(
        Manifest, fields, named_in=file, remedy="rebuild the shards", error=ShardFormatError
    )
    names = [name for entry in manifest.all_shards() for name in (entry.path, entry.index)]
    check_names([manifest.tokenizer.path, *names], named_in=file, error=ShardFormatError)
    if len(set(names)) < len(names):
        raise ShardFormatError(f"{file} names a file for two shards; rebuild the shards")
    manifest._root = absolute(file.parent)
    return manifest
