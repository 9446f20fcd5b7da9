"""Saving: every rank writes its rectangles to one file, then the first rank the manifest.

torch.distributed.checkpoint (DCP) is not used. Its safetensors writer keys tensors by name alone,
so two rectangles of one tensor in one file overwrite each other, and it holds the whole file in
memory; its other writer pickles. What is left of it then is the exchange of plans and errors, and
`pretrain.checkpoint.ranks` has that in a form that a background thread can use.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import platform
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from pretrain.checkpoint.ranks import Ranks
from pretrain.checkpoint.retention import Retention, apply_retention
from xlstm_io.checkpoint.manifest import (
    FOLDER_NAME,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_NAME,
    METADATA_NAME,
    check_size,
    manifest_checksum,
    step_folder_name,
)
from xlstm_io.checkpoint.reader import BLOCK_BYTES, Chunk, check_exact_cover
from xlstm_io.checkpoint.safetensors_stream import (
    DTYPE_NAMES,
    Entry,
    WrittenFile,
    hash_file,
    write_safetensors,
)
from xlstm_io.errors import CheckpointError
from xlstm_io.storage import Location, location, make_folder, put, remove_folder, sync_folder

log = logging.getLogger(__name__)


def save_checkpoint(
    root: Location | str,
    chunks: Sequence[Chunk],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    step: int,
    ranks: Ranks | None = None,
    keep: int | None = None,
) -> Location:
    """Save a checkpoint under `root`/checkpoints and return its folder when it is complete.

    Called by all `ranks` (default: all; without torch.distributed: this process). Each passes the
    rectangles that it alone owns: together they must cover every tensor exactly once. `state` and
    `config` are JSON (the first rank's are stored). No rank holds more than one block besides what
    it was given. Afterwards all but the newest `keep` complete checkpoints are deleted (None: all
    are kept).

    Raises CheckpointError, the same on every rank, if the file system refuses, if pieces overlap or
    are missing, or if `state` or `config` is not JSON. Earlier checkpoints are untouched then, and
    the incomplete attempt is removed.
    """
    ranks = ranks or Ranks()
    folder = location(root) / FOLDER_NAME
    path = write_checkpoint(folder, chunks, state, config, step=step, ranks=ranks)
    if keep is not None and ranks.is_first:
        apply_retention(folder, Retention(keep=keep), path)
    return path


def write_checkpoint(
    folder: Location,
    chunks: Sequence[Chunk],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    step: int,
    ranks: Ranks,
) -> Location:
    """`save_checkpoint` into exactly `folder`, without retention; may run in any thread."""
    what = f"saving the checkpoint of step {step}"
    remedy = f"; nothing was saved, earlier checkpoints in {folder} are as they were"
    path = ranks.first(what, lambda: _start(folder, step, state, config), remedy)
    try:
        parts = ranks.together(what, lambda: _write_part(path, ranks.rank, chunks), remedy)
        ranks.first(what, lambda: _finish(path, parts, step, state, config), remedy)
    except BaseException:
        # Errors of the ranks reach all of them, so nobody is writing any more.
        if ranks.is_first:
            _discard(path)
        raise
    return path


@dataclasses.dataclass(frozen=True)
class _Part:
    """What one rank wrote.

    tensors: {name: (global shape, dtype name)}; rows: {name: [[offset, shape, file, begin, xxh3]]}.
    """

    file: str
    written: WrittenFile | None
    tensors: dict[str, tuple[tuple[int, ...], str]]
    rows: dict[str, list[list]]


def blocks_of(chunk: Chunk) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """Cut a rectangle along its first axis into blocks: (offset in the global tensor, view)."""
    tensor, offset = chunk.tensor.detach(), tuple(chunk.global_offset)
    axis = next((a for a, size in enumerate(tensor.shape) if size > 1), None)
    if axis is None:
        yield offset, tensor
        return
    row_bytes = tensor.numel() // tensor.shape[axis] * tensor.element_size()
    rows = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, tensor.shape[axis], rows):
        place = (*offset[:axis], offset[axis] + start, *offset[axis + 1 :])
        yield place, tensor.narrow(axis, start, min(rows, tensor.shape[axis] - start))


def _start(folder: Location, step: int, state: Mapping, config: Mapping) -> Location:
    """On the first rank: refuse what is not JSON, and create the attempt's folder."""
    for name, value in (("state", state), ("config", config)):
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the {name} to be saved is not JSON: {error}") from error
    path = folder / step_folder_name(step, secrets.token_hex(4))
    make_folder(path)
    return path


def _write_part(path: Location, rank: int, chunks: Sequence[Chunk]) -> _Part:
    """On every rank: stream its rectangles into its file."""
    part = _Part(f"data-{rank:05d}.safetensors", None, {}, {})
    entries: dict[Entry, tuple[str, tuple[int, ...], torch.Tensor]] = {}
    for chunk in chunks:
        if not chunk.tensor.numel():
            continue
        if chunk.tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"{chunk.name}: dtype {chunk.tensor.dtype} is not in the checkpoint format"
            )
        about = (tuple(chunk.global_shape), DTYPE_NAMES[chunk.tensor.dtype])
        if part.tensors.setdefault(chunk.name, about) != about:
            raise CheckpointError(f"{chunk.name}: {about} and {part.tensors[chunk.name]}")
        for offset, block in blocks_of(chunk):
            key = f"{chunk.name}@{','.join(map(str, offset))}"
            entry = Entry(key, block.dtype, tuple(block.shape))
            if entry in entries:
                raise CheckpointError(f"{chunk.name}: two pieces at {list(offset)}")
            entries[entry] = chunk.name, offset, block
    if not entries:
        return part
    written, places = write_safetensors(
        path / part.file, list(entries), lambda entry: entries[entry][2]
    )
    for entry, (name, offset, _) in entries.items():
        place = places[entry]
        row = [list(offset), list(entry.shape), part.file, place.begin, place.xxh3]
        part.rows.setdefault(name, []).append(row)
    return dataclasses.replace(part, written=written)


def _finish(
    path: Location, parts: Sequence[_Part], step: int, state: Mapping, config: Mapping
) -> None:
    """On the first rank, when all data is stored: check, metadata, and the manifest last."""
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    rows: dict[str, list[list]] = {}
    pieces: dict[str, list[tuple]] = {}
    for rank, part in enumerate(parts):
        for name, about in part.tensors.items():
            if tensors.setdefault(name, about) != about:
                (shape, dtype), (other_shape, other_dtype) = about, tensors[name]
                raise CheckpointError(
                    f"{name}: rank {rank} has {list(shape)} {dtype}, other ranks have "
                    f"{list(other_shape)} {other_dtype}"
                )
            rows.setdefault(name, []).extend(part.rows[name])
            pieces.setdefault(name, []).extend((row[0], row[1], rank) for row in part.rows[name])
    for name in tensors:
        check_exact_cover(name, tensors[name][0], pieces[name])
    metadata = path / METADATA_NAME
    put(metadata, json.dumps({"tensors": dict(sorted(rows.items()))}).encode())
    files = {METADATA_NAME: hash_file(metadata)}
    files |= {part.file: part.written for part in parts if part.written is not None}
    for name, written in files.items():  # someone may have cleaned up meanwhile
        check_size(path / name, written)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "complete": True,
        "step": step,
        "created": time.time(),
        "versions": _versions(),
        "state": state,
        "config": config,
        "files": {name: dataclasses.asdict(files[name]) for name in sorted(files)},
        "tensors": {
            name: {"shape": list(shape), "dtype": dtype}
            for name, (shape, dtype) in sorted(tensors.items())
        },
    }
    # The checksum is over what a reader will parse (tuples are lists by then).
    manifest = json.loads(json.dumps(manifest))
    manifest["checksum"] = manifest_checksum(manifest)
    put(path / MANIFEST_NAME, json.dumps(manifest, indent=1).encode())
    sync_folder(path.parent)


def _discard(path: Location) -> None:
    """Remove an incomplete attempt, to free its space."""
    log.warning("removing the incomplete attempt %s", path)
    try:
        remove_folder(path)
    except OSError as error:
        log.warning("could not remove %s: %s", path, error)


def _versions() -> dict[str, str]:
    """Versions of what wrote the checkpoint."""
    # torch's own string names its build (+cpu, +cu130), the installed metadata may not.
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("xlstm-pretrain", "megatron-core"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found
