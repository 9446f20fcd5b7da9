"""Write a checkpoint from one process, one tensor in memory at a time, as a conversion does.

A conversion of a large model takes long, so one that is killed goes on: each finished data file is
noted with its hash in the attempt's folder. Such a folder has no manifest, so nothing loads it.
"""

import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash

from xlstm_io.checkpoint.manifest import (
    CHECKPOINTS_FOLDER,
    MANIFEST_NAME,
    TensorInfo,
    manifest_checksum,
    step_folders,
)
from xlstm_io.checkpoint.reader import TensorSlice
from xlstm_io.checkpoint.safetensors_stream import WrittenFile, hash_file
from xlstm_io.checkpoint.writer import (
    DataFile,
    discard_attempt,
    finish_attempt,
    start_attempt,
    versions,
    write_data_file,
)
from xlstm_io.errors import CheckpointError, UserError
from xlstm_io.foreign.untrusted import LIMITS
from xlstm_io.storage import Location, exists, location, read_file, remove_file, write_atomic

DATA_FILE_BYTES = 4 << 30
"""Where a conversion begins another data file."""
PROGRESS = "conversion_progress.json"
"""Lists the finished data files of an attempt; it goes when the manifest is there."""


def write_streamed(
    root: Location | str,
    tensors: Mapping[str, TensorInfo],
    load: Callable[[str], torch.Tensor],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    step: int = 0,
    files: Mapping[str, bytes] | None = None,
    source: str | None = None,
    kept: Callable[[int], None] = lambda number: None,
) -> Location:
    """Write a checkpoint, or go on with one that was killed.

    Args:
        root: The run's folder, a path or an fsspec URL.
        tensors: Shapes and dtypes by global name.
        load: Returns a tensor by name.
        state: The training state, as JSON.
        config: The configuration, likewise.
        step: Training steps done.
        files: Small files that travel with it, by name.
        source: A text that changes when `load` would return other tensors. With it, an attempt that
            was killed goes on, and one that the file system ended is kept. Without it, an attempt
            that fails is removed.
        kept: Called with the number of tensors that an earlier attempt had finished.

    Returns:
        Its folder.

    Raises:
        CheckpointError: A dtype is not in the format, `state` or `config` is not JSON, or another
            process is writing there.
        OSError: The file system refuses.
    """
    folder = location(root) / CHECKPOINTS_FOLDER
    infos = {name: [list(info.shape), str(info.dtype)] for name, info in tensors.items()}
    plan = json.dumps([source, step, infos, state, config, versions(), DATA_FILE_BYTES])
    plan = xxhash.xxh3_128_hexdigest(plan.encode())
    path, written = (None, []) if source is None else _unfinished(location(root), plan)
    if path is None:
        path = start_attempt(folder, step, state, config)
    kept(sum(len(data_file.tensors) for data_file in written))
    with _only_writer(path):
        try:
            if source is not None:
                _note(path, plan, written)
            for number, slices in enumerate(_portions(tensors)):
                if number < len(written):
                    continue
                written.append(write_data_file(path, number, slices, load))
                if source is not None:
                    _note(path, plan, written)
            finish_attempt(path, written, step, state, config, files or {})
        except BaseException as error:
            # What is wrong with the input itself would be wrong again.
            broken = isinstance(error, UserError) and not isinstance(error.__cause__, OSError)
            if source is None or broken:
                discard_attempt(path)
            raise
    if source is not None:
        remove_file(path / PROGRESS)
    return path


def _note(path: Location, plan: str, written: list[DataFile]) -> None:
    body = {"plan": plan, "files": [dataclasses.asdict(data_file) for data_file in written]}
    body = json.loads(json.dumps(body))  # tuples are lists by then
    body["checksum"] = manifest_checksum(body)
    write_atomic(path / PROGRESS, json.dumps(body).encode(), make_parents=False)


def _unfinished(root: Location, plan: str) -> tuple[Location | None, list[DataFile]]:
    """The attempt of this plan that was killed, with its finished data files.

    Attempts of other plans are removed: nothing will go on with them.
    """
    chosen: Location | None = None
    written: list[DataFile] = []
    for path in step_folders(root):
        if exists(path / MANIFEST_NAME) or not exists(path / PROGRESS):
            continue
        with _only_writer(path):
            found = _finished(path, plan)
        if found and chosen is None:
            chosen, written = path, found
        else:
            discard_attempt(path)
    return chosen, written


def _finished(path: Location, plan: str) -> list[DataFile]:
    """The data files of an attempt that are there as they were noted; none of another plan."""
    try:
        body = json.loads(read_file(path / PROGRESS, LIMITS.checkpoint_json))
        if body["plan"] != plan or body["checksum"] != manifest_checksum(body):
            return []
        noted = [_data_file(entry) for entry in body["files"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []  # cut short, or written by something else
    found: list[DataFile] = []
    for data_file in noted:
        file = path / data_file.file
        if not exists(file) or hash_file(file) != data_file.written:
            break  # what follows is written again
        found.append(data_file)
    return found


def _data_file(entry: dict[str, Any]) -> DataFile:
    written = WrittenFile(**entry["written"])
    tensors = {name: (tuple(shape), dtype) for name, (shape, dtype) in entry["tensors"].items()}
    return DataFile(entry["file"], written, tensors, entry["stored"])


@contextmanager
def _only_writer(path: Location) -> Iterator[None]:
    """Keep other processes of this machine out of an attempt; CheckpointError if one is in it."""
    if not isinstance(path, Path):
        yield
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another conversion is writing {path}; wait for it") from None
        yield
    finally:
        os.close(folder)


def _portions(tensors: Mapping[str, TensorInfo]) -> Iterator[list[TensorSlice]]:
    """Whole tensors without memory, in portions of about `DATA_FILE_BYTES`."""
    portion: list[TensorSlice] = []
    size = 0
    for name, info in tensors.items():
        empty = torch.empty(info.shape, dtype=info.dtype, device="meta")
        bytes_here = empty.numel() * empty.element_size()
        if portion and size + bytes_here > DATA_FILE_BYTES:
            yield portion
            portion, size = [], 0
        portion.append(TensorSlice(name, info.shape, (0,) * len(info.shape), empty))
        size += bytes_here
    if portion:
        yield portion
