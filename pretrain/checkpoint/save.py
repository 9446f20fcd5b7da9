"""Saving: every rank writes its slices to one file, then the first rank writes the manifest.

torch.distributed.checkpoint (DCP) is not used. Its safetensors writer keys tensors by name alone,
so two slices of one tensor in one file overwrite each other, and it holds the whole file in memory.
Its other writer pickles. What is left of it then is the exchange of plans and errors, and
`pretrain.checkpoint.ranks` has that in a form that a background thread can use.
"""

import dataclasses
import importlib.metadata
import json
import logging
import platform
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import xxhash

from pretrain.checkpoint.ranks import Ranks
from pretrain.checkpoint.retention import Retention, apply_retention
from xlstm_io.checkpoint.manifest import (
    CHECKPOINTS_FOLDER,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_NAME,
    METADATA_NAME,
    check_size,
    manifest_checksum,
    step_folder_name,
)
from xlstm_io.checkpoint.reader import STORED_SLICE_BYTES, TensorSlice, check_exact_cover
from xlstm_io.checkpoint.safetensors_stream import (
    DTYPE_NAMES,
    TensorHeader,
    WrittenFile,
    hash_file,
    write_safetensors,
)
from xlstm_io.errors import CheckpointError, Superseded
from xlstm_io.storage import (
    Location,
    location,
    make_folder,
    remove_folder,
    sync_folder,
    write_atomic,
)

log = logging.getLogger(__name__)


def save_checkpoint(
    root: Location | str,
    slices: Sequence[TensorSlice],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    step: int,
    files: Mapping[str, bytes] | None = None,
    ranks: Ranks | None = None,
    keep: int | None = None,
) -> Location:
    """Save a checkpoint under `root`/checkpoints and return its folder when it is complete.

    All ranks call it. No rank holds more than one stored slice besides what it was given.

    Args:
        root: The run's folder, a path or an fsspec URL.
        slices: What this rank alone owns. The slices of all ranks together must cover every tensor
            exactly once.
        state: The training state, as JSON; that of the first rank is stored.
        config: The configuration, likewise.
        step: Training steps done.
        files: Small files that travel with the checkpoint, by name; those of the first rank are
            stored. They are the tokenizer's.
        ranks: Who saves together (default: all; without torch.distributed: this process).
        keep: Afterwards all but so many of the newest complete checkpoints are deleted (None: all
            are kept).

    Raises:
        CheckpointError: The file system refuses, slices overlap or are missing, or `state` or
            `config` is not JSON. The error is the same on every rank. Earlier checkpoints are
            untouched then, and the incomplete attempt is removed.
    """
    ranks = ranks or Ranks()
    folder = location(root) / CHECKPOINTS_FOLDER
    path = write_checkpoint(folder, slices, state, config, step=step, files=files, ranks=ranks)
    if keep is not None and ranks.is_first:
        apply_retention(folder, Retention(keep=keep), path)
    return path


def write_checkpoint(
    folder: Location,
    slices: Sequence[TensorSlice],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    step: int,
    files: Mapping[str, bytes] | None = None,
    ranks: Ranks,
    fence: Callable[[], None] = lambda: None,
) -> Location:
    """`save_checkpoint` into exactly `folder`, without retention; may run in any thread.

    Args:
        folder: Where the checkpoints lie.
        slices: See `save_checkpoint`, also for the other arguments.
        state: See there.
        config: See there.
        step: See there.
        files: See there.
        ranks: See there.
        fence: Called on the first rank right before the manifest makes the checkpoint complete. It
            raises Superseded when this process may no longer write.
    """
    what = f"saving the checkpoint of step {step}"
    remedy = f"; nothing was saved, earlier checkpoints in {folder} are as they were"
    path = ranks.first(what, lambda: _start(folder, step, state, config), remedy)
    try:
        data_files = ranks.together(what, lambda: _write_slices(path, ranks.rank, slices), remedy)
        ranks.first(
            what,
            lambda: _finish(path, data_files, step, state, config, files or {}, fence),
            remedy,
        )
    except Superseded:
        raise  # a life that has been superseded deletes nothing
    except BaseException:
        # Errors of the ranks reach all of them, so nobody is writing any more.
        if ranks.is_first:
            _discard(path)
        raise
    return path


@dataclasses.dataclass(frozen=True)
class _DataFile:
    """What one rank wrote.

    Attributes:
        file: Name of its file.
        written: Size and hash of the file; None if the rank owned nothing and wrote none.
        tensors: Global shape and dtype name of each tensor, by name.
        stored: `[offset, shape, file, begin, xxh3]` of each stored slice, by the tensor's name.
    """

    file: str
    written: WrittenFile | None
    tensors: dict[str, tuple[tuple[int, ...], str]]
    stored: dict[str, list[list]]


def cut_for_storage(part: TensorSlice) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """Cut a slice along its first axis to the size of stored slices.

    Yields:
        `(offset, view)` of each: its offset in the global tensor, and its memory.
    """
    tensor, offset = part.tensor.detach(), tuple(part.global_offset)
    axis = next((a for a, size in enumerate(tensor.shape) if size > 1), None)
    if axis is None:
        yield offset, tensor
        return
    row_bytes = tensor.numel() // tensor.shape[axis] * tensor.element_size()
    rows = max(1, STORED_SLICE_BYTES // row_bytes)
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


def _write_slices(path: Location, rank: int, slices: Sequence[TensorSlice]) -> _DataFile:
    """On every rank: stream its slices into its file."""
    data_file = _DataFile(f"data-{rank:05d}.safetensors", None, {}, {})
    contents: dict[TensorHeader, tuple[str, tuple[int, ...], torch.Tensor]] = {}
    for part in slices:
        if not part.tensor.numel():
            continue
        if part.tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"{part.name}: dtype {part.tensor.dtype} is not in the checkpoint format"
            )
        about = (tuple(part.global_shape), DTYPE_NAMES[part.tensor.dtype])
        if data_file.tensors.setdefault(part.name, about) != about:
            raise CheckpointError(f"{part.name}: {about} and {data_file.tensors[part.name]}")
        for offset, view in cut_for_storage(part):
            key = f"{part.name}@{','.join(map(str, offset))}"
            header = TensorHeader(key, view.dtype, tuple(view.shape))
            if header in contents:
                raise CheckpointError(f"{part.name}: two slices at {list(offset)}")
            contents[header] = part.name, offset, view
    if not contents:
        return data_file
    written, places = write_safetensors(
        path / data_file.file, list(contents), lambda header: contents[header][2]
    )
    for header, (name, offset, _) in contents.items():
        place = places[header]
        stored = [list(offset), list(header.shape), data_file.file, place.begin, place.xxh3]
        data_file.stored.setdefault(name, []).append(stored)
    return dataclasses.replace(data_file, written=written)


def _finish(
    path: Location,
    data_files: Sequence[_DataFile],
    step: int,
    state: Mapping,
    config: Mapping,
    small_files: Mapping[str, bytes],
    fence: Callable[[], None],
) -> None:
    """On the first rank, when all data is stored: check, metadata, and the manifest last."""
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    stored: dict[str, list[list]] = {}
    slices: dict[str, list[tuple]] = {}
    for rank, data_file in enumerate(data_files):
        for name, about in data_file.tensors.items():
            if tensors.setdefault(name, about) != about:
                (shape, dtype), (other_shape, other_dtype) = about, tensors[name]
                raise CheckpointError(
                    f"{name}: rank {rank} has {list(shape)} {dtype}, other ranks have "
                    f"{list(other_shape)} {other_dtype}"
                )
            stored.setdefault(name, []).extend(data_file.stored[name])
            slices.setdefault(name, []).extend(
                (offset, shape, rank) for offset, shape, *_ in data_file.stored[name]
            )
    for name in tensors:
        check_exact_cover(name, tensors[name][0], slices[name])
    metadata = path / METADATA_NAME
    body = json.dumps({"tensors": dict(sorted(stored.items()))})
    write_atomic(metadata, body.encode(), make_parents=False)
    files = {METADATA_NAME: hash_file(metadata)}
    for name, data in small_files.items():
        write_atomic(path / name, data, make_parents=False)
        files[name] = WrittenFile(len(data), xxhash.xxh3_64_hexdigest(data))
    files |= {
        data_file.file: data_file.written
        for data_file in data_files
        if data_file.written is not None
    }
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
    fence()
    write_atomic(path / MANIFEST_NAME, json.dumps(manifest, indent=1).encode(), make_parents=False)
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
