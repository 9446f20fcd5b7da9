"""Writing the files of a checkpoint; readers count it once its manifest is there.

Ranks that save together each write one data file (`pretrain.checkpoint.save`). A conversion writes
whole tensors, one in memory at a time (`xlstm_io.checkpoint.streamed`). The format is described in
`xlstm_io.checkpoint.manifest`.
"""

import dataclasses
import importlib.metadata
import json
import logging
import platform
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import xxhash

from xlstm_io.checkpoint.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_NAME,
    METADATA_NAME,
    check_sizes,
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
from xlstm_io.checkpoint.schema import ManifestBody
from xlstm_io.errors import CheckpointError
from xlstm_io.foreign.json_file import checked
from xlstm_io.storage import (
    Location,
    make_folder,
    remove_folder,
    sync_folder,
    write_atomic,
)

log = logging.getLogger(__name__)

_BUG = "no reader would take that, so it is not written; this is a bug of the program: report it"


@dataclasses.dataclass(frozen=True)
class DataFile:
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


def start_attempt(folder: Location, step: int, state: Mapping, config: Mapping) -> Location:
    """Create the folder of an attempt to save `step`; one process calls it.

    Raises:
        CheckpointError: `state` or `config` is not JSON.
        OSError: The file system refuses.
    """
    for name, value in (("state", state), ("config", config)):
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the {name} to be saved is not JSON: {error}") from error
    path = folder / step_folder_name(step, secrets.token_hex(4))
    make_folder(path)
    return path


def write_data_file(
    path: Location,
    number: int,
    slices: Sequence[TensorSlice],
    load: Callable[[str], torch.Tensor] | None = None,
) -> DataFile:
    """Stream slices into one data file.

    Args:
        path: The attempt's folder.
        number: Number of the file.
        slices: What it holds.
        load: Returns a whole tensor by name, in place of the slices' memory; those may then lie
            on the meta device. The last one is kept, since its stored slices follow each other.

    Raises:
        CheckpointError: A dtype is not in the format, or two slices are the same.
        OSError: The file system refuses.
    """
    data_file = DataFile(f"data-{number:05d}.safetensors", None, {}, {})
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
    kept: tuple[str, torch.Tensor] | None = None

    def tensor_of(header: TensorHeader) -> torch.Tensor:
        nonlocal kept
        name, offset, view = contents[header]
        if load is None:
            return view
        if kept is None or kept[0] != name:
            kept = None  # frees its memory before the next is loaded
            kept = name, load(name)
        return kept[1][tuple(slice(o, o + n) for o, n in zip(offset, view.shape, strict=True))]

    written, places = write_safetensors(path / data_file.file, list(contents), tensor_of)
    for header, (name, offset, _) in contents.items():
        place = places[header]
        stored = [list(offset), list(header.shape), data_file.file, place.begin, place.xxh3]
        data_file.stored.setdefault(name, []).append(stored)
    return dataclasses.replace(data_file, written=written)


def finish_attempt(
    path: Location,
    data_files: Sequence[DataFile],
    step: int,
    state: Mapping,
    config: Mapping,
    small_files: Mapping[str, bytes],
    fence: Callable[[], None] = lambda: None,
) -> None:
    """Make an attempt complete when all data is stored: check, metadata, and the manifest last.

    Args:
        path: The attempt's folder.
        data_files: What was written, in the order of the ranks.
        step: Training steps done.
        state: The training state, as JSON.
        config: The configuration, likewise.
        small_files: Files to be written beside, by name.
        fence: Called right before the manifest is written.

    Raises:
        CheckpointError: The slices do not hold every element of every tensor exactly once, or a
            reader would refuse the manifest.
        OSError: The file system refuses.
    """
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
    check_sizes(path, files)  # someone may have cleaned up meanwhile
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "complete": True,
        "step": step,
        "created": time.time(),
        "versions": versions(),
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
    # A checkpoint that no reader takes is worse than none: everybody would rely on it.
    checked(
        ManifestBody, manifest, named_in=path / MANIFEST_NAME, remedy=_BUG, error=CheckpointError
    )
    fence()
    write_atomic(path / MANIFEST_NAME, json.dumps(manifest, indent=1).encode(), make_parents=False)
    sync_folder(path.parent)


def discard_attempt(path: Location) -> None:
    """Remove an incomplete attempt, to free its space."""
    log.warning("removing the incomplete attempt %s", path)
    try:
        remove_folder(path)
    except OSError as error:
        log.warning("could not remove %s: %s", path, error)


def versions() -> dict[str, str]:
    """Versions of what wrote the checkpoint."""
    # torch's own string names its build (+cpu, +cu130), the installed metadata may not.
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("xlstm-pretrain", "megatron-core"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found
