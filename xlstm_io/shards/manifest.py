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
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from xlstm_io.errors import ShardFormatError
from xlstm_io.field_errors import key_of, rule_of
from xlstm_io.storage import read_file, write_atomic
from xlstm_io.untrusted import LIMITS, check_name, inside

MANIFEST_NAME = "manifest.json"
FORMAT = "xtok-wds"
VERSION = 1


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardEntry(_Model):
    """One tar of blocks. `path` and `index` are relative to the manifest's folder."""

    path: str
    index: str
    rows: int
    tokens: int
    """Document tokens with bos and eos; neither the overlap between rows nor padding counts."""
    targets: int
    """Positions that the loss counts: one less than the tokens of each document."""
    pad_tokens: int
    docs: int
    bytes_in: int
    """UTF-8 bytes of the documents' texts."""
    bytes: int
    """Size of the tar."""
    xxh3: str
    index_xxh3: str


class SplitEntry(_Model):
    """Totals of a split of one source, and its shards in row order."""

    rows: int
    tokens: int
    targets: int
    pad_tokens: int
    docs: int
    bytes_in: int
    shards: list[ShardEntry]


class SourceEntry(_Model):
    """One named corpus; `provenance` is its licence and origin note, where one was given."""

    name: str
    provenance: dict[str, Any] | None
    documents_read: int
    dropped: dict[str, int]
    """Documents that were left out, by reason (duplicate, empty, malformed, filters by name)."""
    filters: dict[str, Any] = {}
    """Parameters of the filters that were applied, by name."""
    splits: dict[str, SplitEntry]


class TokenizerEntry(_Model):
    """The tokenizer that made the ids; `path` is relative to the manifest's folder."""

    type: Literal["sentencepiece", "huggingface"]
    path: str
    sha256: str
    vocab_size: int


class Manifest(_Model):
    """`manifest.json`. Obtain one with `load_manifest`, which checks it."""

    version: Literal[1]
    format: Literal["xtok-wds"]
    dtype: Literal["uint16", "uint32"]
    seq_len: int
    row_tokens: int
    """Tokens stored per row: seq_len + 1; neighbouring rows of concat share one token."""
    block_rows: int
    packing: Literal["concat", "best_fit"]
    add_bos: bool
    add_eos: bool
    bos_id: int
    eos_id: int
    pad_id: int
    tokenizer: TokenizerEntry
    valid_fraction: float
    config_hash: str
    sources: list[SourceEntry]
    code: dict[str, str]
    hash: str
    checksum: str

    _root: Path = PrivateAttr(default=Path("."))

    @property
    def root(self) -> Path:
        """Absolute folder that the manifest's relative paths start from."""
        return self._root

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
        folder = PurePosixPath(self.tokenizer.path).parent
        files = sorted(self.tokenizer_path.parent.iterdir())
        return [self.place((folder / file.name).as_posix()) for file in files if file.is_file()]

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


def place_of(root: Path, name: str) -> Path:
    """The place in `root` of a file that its manifest names, to be read or written.

    Raises:
        ShardFormatError: the name is not relative, or a link leads from it out of the folder.
    """
    return inside(root, name, named_in=root / MANIFEST_NAME, error=ShardFormatError)


def _digest(fields: dict[str, Any], *without: str) -> str:
    kept = {key: value for key, value in fields.items() if key not in without}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def write_manifest(root: Path, fields: dict[str, Any]) -> Manifest:
    """Complete `fields` with version, format and digests; write the manifest atomically.

    Must be the last thing that a build writes.
    """
    fields = {"version": VERSION, "format": FORMAT, **fields}
    fields["hash"] = _digest(fields, "code", "hash", "checksum")
    fields["checksum"] = _digest(fields, "checksum")
    manifest = Manifest.model_validate(fields)
    write_atomic(root / MANIFEST_NAME, json.dumps(fields, indent=1).encode() + b"\n")
    manifest._root = root.resolve()
    return manifest


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
    try:
        raw = read_file(file, LIMITS.shard_manifest, links=True)
    except FileNotFoundError:
        raise ShardFormatError(
            f"{file} does not exist: the build is unfinished or this is another folder; "
            "run `python -m data_prep build` (again) with this --out, it keeps finished shards"
        ) from None
    except OSError as error:
        raise ShardFormatError(f"{file} cannot be read: {error.strerror or error}") from error
    try:
        fields = json.loads(raw)
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        raise ShardFormatError(
            f"{file} is not valid JSON ({error}): it is damaged; restore it, or delete it and "
            "run `python -m data_prep build` again, which keeps finished shards"
        ) from None
    if fields.get("format") != FORMAT or fields.get("version") != VERSION:
        raise ShardFormatError(
            f"{file} has format={fields.get('format')!r} version={fields.get('version')!r}; "
            f"this code reads format={FORMAT!r} version={VERSION}; rebuild the shards"
        )
    if fields.get("checksum") != _digest(fields, "checksum"):
        raise ShardFormatError(
            f"{file} does not match its checksum: it was edited or damaged; restore it, or delete "
            "it and run `python -m data_prep build` again, which keeps finished shards"
        )
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{key_of(first['loc'])} {rule_of(first)}"
        raise ShardFormatError(f"{file}: {where}; rebuild the shards") from None
    entries = [entry for split in manifest.split_names() for entry in manifest.shards(split)]
    names = [name for entry in entries for name in (entry.path, entry.index)]
    for name in (manifest.tokenizer.path, *names):
        check_name(name, named_in=file, error=ShardFormatError)
    if len(set(names)) < len(names):
        raise ShardFormatError(f"{file} names a file for two shards; rebuild the shards")
    manifest._root = file.parent.resolve()
    return manifest
