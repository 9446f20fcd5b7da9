"""The tokenizer of a checkpoint.

A checkpoint holds the files of the tokenizer that its model was trained with, so a copy of the
folder is all that another machine needs. Checkpoints of version 0.1 only name a file.
"""

from pathlib import Path
from typing import Any

import xxhash

from xlstm_io.checkpoint.manifest import Manifest, read_manifest
from xlstm_io.checkpoint.safetensors_stream import WrittenFile
from xlstm_io.errors import CheckpointDamagedError, CheckpointError
from xlstm_io.foreign.untrusted import LIMITS
from xlstm_io.storage import Location, exists, location, read_file
from xlstm_io.tokenizer import (
    TOKENIZER_FILES,
    Tokenizer,
    open_tokenizer,
    tokenizer_from_files,
)


def tokenizer_of(path: Location, given: str | Location | None = None) -> Tokenizer:
    """The tokenizer that made the ids a checkpoint was trained on.

    It is the one that the user gives, else the one in the checkpoint, else the one that the
    checkpoint names.

    Args:
        path: the checkpoint's folder.
        given: a tokenizer's file or folder.

    Raises:
        CheckpointError: there is none, or it is not the one that the model was trained with.
        TokenizerFileError: it cannot be opened.
    """
    if given is not None and not exists(location(given)):
        raise CheckpointError(f"{given}: no such file or folder; give the tokenizer's")
    manifest = read_manifest(path)
    recorded: dict[str, Any] = manifest.state.get("tokenizer") or {}
    tokenizer = _from_checkpoint(path, manifest) if given is None else open_tokenizer(given)
    if tokenizer is None:
        if "path" not in recorded:
            raise CheckpointError(f"{path} has no tokenizer; give one with --tokenizer FILE|FOLDER")
        file = Path(recorded["path"])
        if not file.is_file():
            raise CheckpointError(
                f"{path} was trained with the tokenizer {file}, which is not there: no such file; "
                "give it with --tokenizer FILE|FOLDER"
            )
        tokenizer = open_tokenizer(file)
    expected = recorded.get("sha256", tokenizer.sha256)
    if tokenizer.sha256 != expected:
        raise CheckpointError(
            f"{tokenizer.path} is not the tokenizer of this checkpoint ({path}): its sha256 begins "
            f"with {tokenizer.sha256[:12]}, that of training with {expected[:12]}; give the right "
            "one with --tokenizer FILE|FOLDER"
        )
    return tokenizer


def _from_checkpoint(path: Location, manifest: Manifest) -> Tokenizer | None:
    """The tokenizer whose files lie in the checkpoint; None where there are none."""
    names = [name for name in TOKENIZER_FILES if name in manifest.files]
    if not names:
        return None
    files = {}
    for name in names:
        try:
            data = read_file(path / name, LIMITS.tokenizer)
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read: {error}") from error
        if WrittenFile(len(data), xxhash.xxh3_64_hexdigest(data)) != manifest.files[name]:
            raise CheckpointDamagedError(
                f"{path / name} does not match its hash in the manifest: it is corrupted"
            )
        files[name] = data
    return tokenizer_from_files(files, path / names[0])
