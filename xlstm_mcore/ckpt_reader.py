"""The checkpoint format, and reading it: finding, checking, and reading tensors by rectangle.

A checkpoint is a folder `step-00000200-<attempt id>`:

    data-00000.safetensors ...   one file per saving rank; a tensor's stored rectangle ("chunk") has
                                 the key `<name>@<offset>,<offset>...`
    metadata.json                {"tensors": {name: [[offset, shape, file], ...]}}: where chunks lie
    manifest.json                written last: sizes and hashes of the files, the global tensors,
                                 training state, config, versions, `complete: true`

Readers trust only a manifest that is complete, has the right checksum, and whose files have the
sizes it says. Everything is JSON or safetensors: loading a stranger's checkpoint executes no code.

This module needs neither the trainer nor torch.distributed, so that conversion and evaluation of a
checkpoint work in one plain process. Writing is `pretrain.checkpoint`'s.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from xlstm_mcore.safetensors_stream import DTYPES, WrittenFile, hash_file

FORMAT = "xlstm-pretrain checkpoint"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
METADATA_NAME = "metadata.json"
FOLDER_NAME = "checkpoints"
OPTIMIZER_PREFIX = "optimizer."
_STEP_FOLDER = re.compile(r"step-(\d{8,})-[\w.]+")

log = logging.getLogger(__name__)


class CheckpointFormatError(ValueError):
    """A checkpoint is missing, incomplete, damaged, or does not hold what is asked of it."""


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a global tensor and the local memory that holds it.

    `tensor` is a view with the shape of the rectangle, on any device, with any strides: saving
    reads it, loading copies into it in place. `global_offset` is its corner in `global_shape`.
    """

    name: str
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    tensor: torch.Tensor

    def __post_init__(self):
        shape = tuple(self.tensor.shape)
        fits = len(self.global_shape) == len(self.global_offset) == len(shape) and all(
            0 <= o and o + s <= g
            for o, s, g in zip(self.global_offset, shape, self.global_shape, strict=True)
        )
        if not fits:
            raise CheckpointFormatError(
                f"{self.name}: a piece of shape {list(shape)} at {list(self.global_offset)} does "
                f"not lie inside the tensor's shape {list(self.global_shape)}"
            )


@dataclass(frozen=True)
class StoredChunk:
    """A rectangle of a global tensor as it lies in a file."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a global tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says; `state` and `config` are the trainer's own JSON."""

    step: int
    created: float
    files: dict[str, WrittenFile]
    tensors: dict[str, TensorInfo]
    state: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]


def chunk_key(name: str, offset: Sequence[int]) -> str:
    """Key of a chunk inside its safetensors file."""
    return f"{name}@{','.join(map(str, offset))}"


def step_folder_name(step: int, attempt: str) -> str:
    """Folder of one attempt to save `step`; names sort by step."""
    return f"step-{step:08d}-{attempt}"


def is_weight(name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to the model (and not to the optimizer)."""
    return not name.startswith(OPTIMIZER_PREFIX)


def manifest_checksum(body: dict) -> str:
    """xxh3-64 of the manifest without its own `checksum` key, in canonical JSON."""
    rest = {key: value for key, value in body.items() if key != "checksum"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_64(canonical.encode()).hexdigest()


def read_manifest(path: Path | str) -> Manifest:
    """Read and check the manifest of the checkpoint folder `path`, and its files' sizes.

    Raises CheckpointFormatError saying which file is missing, cut short or unreadable.
    """
    path = Path(path)
    body = _read_json(path / MANIFEST_NAME, absent="it was never completed")
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointFormatError(f"{path / MANIFEST_NAME} is not the manifest of a checkpoint")
    if body.get("format_version") != FORMAT_VERSION:
        raise CheckpointFormatError(
            f"{path}: checkpoint format version {body.get('format_version')}, this program reads "
            f"version {FORMAT_VERSION}; use the version of the program that wrote it"
        )
    if body.get("complete") is not True or body.get("checksum") != manifest_checksum(body):
        raise CheckpointFormatError(f"{path / MANIFEST_NAME} is incomplete or was altered")
    try:
        manifest = Manifest(
            step=int(body["step"]),
            created=float(body["created"]),
            files={n: WrittenFile(f["size"], f["xxh3"]) for n, f in body["files"].items()},
            tensors={
                name: TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
                for name, entry in body["tensors"].items()
            },
            state=body["state"],
            config=body["config"],
            versions=body["versions"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointFormatError(f"{path / MANIFEST_NAME} is malformed: {error!r}") from error
    for name, expected in manifest.files.items():
        if Path(name).name != name:
            raise CheckpointFormatError(f"{path / MANIFEST_NAME} names a file outside: {name!r}")
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise CheckpointFormatError(f"{path / name}: {error.strerror}") from error
        if size != expected.size:
            raise CheckpointFormatError(
                f"{path / name} has {size} bytes, the manifest says {expected.size}"
            )
    return manifest


def verify_hashes(path: Path | str, manifest: Manifest) -> None:
    """Read every file of a checkpoint; CheckpointFormatError names the first one that changed."""
    for name, expected in manifest.files.items():
        if hash_file(Path(path) / name) != expected:
            raise CheckpointFormatError(
                f"{Path(path) / name} does not match its hash in the manifest: it is corrupted"
            )


def step_folders(root: Path | str) -> list[Path]:
    """All checkpoint folders under a run folder or a `checkpoints` folder, whatever their state."""
    root = Path(root)
    folder = root / FOLDER_NAME if (root / FOLDER_NAME).is_dir() else root
    if not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if _STEP_FOLDER.fullmatch(p.name) and p.is_dir()]


def complete_checkpoints(root: Path | str) -> tuple[list[Path], list[str]]:
    """(complete checkpoints, newest first; one sentence for each broken one).

    Newest is the highest step, and among attempts at the same step the last one written.
    """
    found, broken = [], []
    for path in step_folders(root):
        try:
            manifest = read_manifest(path)
        except CheckpointFormatError as error:
            broken.append(str(error))
        else:
            found.append(((manifest.step, manifest.created), path))
    return [path for _, path in sorted(found, reverse=True)], sorted(broken)


def find_latest(root: Path | str, *, verify: bool = False) -> Path | None:
    """The newest complete checkpoint under a run folder or `checkpoints` folder, or None.

    A broken one is named in a warning and passed over; nothing is deleted. `verify=True` also reads
    the files and compares their hashes.
    """
    complete, broken = complete_checkpoints(root)
    for problem in broken:
        log.warning("passing over a broken checkpoint: %s", problem)
    for path in complete:
        try:
            if verify:
                verify_hashes(path, read_manifest(path))
        except CheckpointFormatError as error:
            log.warning("passing over a broken checkpoint: %s", error)
        else:
            return path
    return None


def resolve(path: Path | str) -> Path:
    """The checkpoint that `path` means: itself, or the newest of a run or `checkpoints` folder.

    Raises CheckpointFormatError when there is none, with the reason.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointFormatError(f"{path}: no such folder; give a run folder or a checkpoint")
    if (path / MANIFEST_NAME).exists() or _STEP_FOLDER.fullmatch(path.name):
        read_manifest(path)
        return path
    latest = find_latest(path)
    if latest is None:
        _, broken = complete_checkpoints(path)
        reason = "; ".join(broken) or f"it has no folders {step_folder_name(0, '<attempt>')}"
        raise CheckpointFormatError(f"{path} holds no complete checkpoint: {reason}")
    return latest


class CheckpointReader:
    """Reads rectangles of a checkpoint's tensors; holds one tensor's rectangle at a time.

    Use as a context manager. Raises CheckpointFormatError when the checkpoint is not sound, and for
    a tensor or a rectangle that it does not hold.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        metadata_file = self.path / METADATA_NAME
        if METADATA_NAME not in self.manifest.files:
            raise CheckpointFormatError(f"{self.path}: the manifest lists no {METADATA_NAME}")
        # The data files' hashes are checked on demand only (they take a read of everything); this
        # small file decides which bytes go where, so it is always checked.
        if hash_file(metadata_file) != self.manifest.files[METADATA_NAME]:
            raise CheckpointFormatError(f"{metadata_file} does not match its hash in the manifest")
        self.chunks = self._parse_chunks(_read_json(metadata_file, absent="missing"))
        self._open_files: dict[str, Any] = {}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exc_info) -> None:
        self._open_files.clear()

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a global tensor; CheckpointFormatError if there is none."""
        if name not in self.manifest.tensors:
            raise CheckpointFormatError(f"{self.path} holds no tensor {name}")
        return self.manifest.tensors[name]

    def read(self, name: str, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole tensor `name`, on the CPU, in its own dtype or in `dtype`."""
        info = self.info(name)
        tensor = torch.empty(info.shape, dtype=dtype or info.dtype)
        self.read_into(Chunk(name, info.shape, (0,) * len(info.shape), tensor))
        return tensor

    def read_into(self, chunk: Chunk) -> None:
        """Copy the rectangle that `chunk` covers into its tensor."""
        for stored, inside, target in self.overlaps(chunk):
            shape = tuple(t.stop - t.start for t in target)
            data = self.read_stored(chunk.name, stored, inside, shape)
            with torch.no_grad():
                chunk.tensor[target].copy_(data)

    def overlaps(
        self, chunk: Chunk
    ) -> list[tuple[StoredChunk, tuple[int, ...], tuple[slice, ...]]]:
        """Where the rectangle of `chunk` lies: (stored chunk, offset in it, slices of the target).

        Raises CheckpointFormatError, naming the tensor, if it is missing, has another global shape
        or another kind of dtype, or is not stored completely.
        """
        info = self.info(chunk.name)
        if info.shape != tuple(chunk.global_shape):
            raise CheckpointFormatError(
                f"{chunk.name}: the checkpoint has shape {list(info.shape)}, this model needs "
                f"{list(chunk.global_shape)} ({self.path})"
            )
        if info.dtype.is_floating_point != chunk.tensor.dtype.is_floating_point:
            raise CheckpointFormatError(
                f"{chunk.name}: the checkpoint has {info.dtype}, this model needs "
                f"{chunk.tensor.dtype} ({self.path})"
            )
        found = []
        elements = 0
        for stored in self.chunks.get(chunk.name, ()):
            starts, inside, target = [], [], []
            for (s_off, s_len), (c_off, c_len) in zip(
                zip(stored.offset, stored.shape, strict=True),
                zip(chunk.global_offset, chunk.tensor.shape, strict=True),
                strict=True,
            ):
                start, stop = max(s_off, c_off), min(s_off + s_len, c_off + c_len)
                if start >= stop:
                    break
                starts.append(start)
                inside.append(start - s_off)
                target.append(slice(start - c_off, stop - c_off))
            else:
                found.append((stored, tuple(inside), tuple(target)))
                elements += math.prod(t.stop - t.start for t in target)
        if elements != chunk.tensor.numel():
            raise CheckpointFormatError(
                f"{chunk.name}: {self.path} holds {elements} of the {chunk.tensor.numel()} "
                f"elements at {list(chunk.global_offset)}; it is damaged"
            )
        return found

    def read_stored(
        self, name: str, stored: StoredChunk, inside: Sequence[int], shape: Sequence[int]
    ) -> torch.Tensor:
        """The rectangle of `shape` at offset `inside` of a stored chunk, read from its file."""
        key = chunk_key(name, stored.offset)
        try:
            if stored.file not in self._open_files:
                self._open_files[stored.file] = safe_open(self.path / stored.file, framework="pt")
            if not stored.shape:  # safetensors slices no scalars
                data = self._open_files[stored.file].get_tensor(key)
            else:
                index = tuple(slice(o, o + s) for o, s in zip(inside, shape, strict=True))
                data = self._open_files[stored.file].get_slice(key)[index]
        except (SafetensorError, OSError) as error:
            raise CheckpointFormatError(f"{self.path / stored.file}: {key}: {error}") from error
        if tuple(data.shape) != tuple(shape) or data.dtype != self.info(name).dtype:
            raise CheckpointFormatError(
                f"{self.path / stored.file}: {key} is {list(data.shape)} {data.dtype}, not what "
                f"{METADATA_NAME} says"
            )
        return data

    def _parse_chunks(self, body: Any) -> dict[str, list[StoredChunk]]:
        """Chunks per tensor; every tensor of the manifest must be covered, inside its shape."""
        chunks: dict[str, list[StoredChunk]] = {}
        try:
            for name, rows in body["tensors"].items():
                chunks[name] = [
                    StoredChunk(tuple(offset), tuple(shape), file) for offset, shape, file in rows
                ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointFormatError(f"{self.path / METADATA_NAME}: {error!r}") from error
        for name, info in self.manifest.tensors.items():
            stored = chunks.get(name, [])
            inside = all(
                c.file in self.manifest.files
                and len(c.offset) == len(c.shape) == len(info.shape)
                and all(
                    0 <= o and 0 < s and o + s <= g
                    for o, s, g in zip(c.offset, c.shape, info.shape, strict=True)
                )
                for c in stored
            )
            if not inside or sum(math.prod(c.shape) for c in stored) != math.prod(info.shape):
                raise CheckpointFormatError(
                    f"{name}: its chunks in {self.path / METADATA_NAME} do not make up a tensor "
                    f"of shape {list(info.shape)}"
                )
        return chunks


def show(path: Path | str) -> str:
    """What the checkpoint `path` (resolved as in `resolve`) contains, as text for a person."""
    path = resolve(path)
    manifest = read_manifest(path)
    weights = {n: t for n, t in manifest.tensors.items() if is_weight(n)}
    parameters = sum(math.prod(t.shape) for t in weights.values())
    size = sum(f.size for f in manifest.files.values())
    model = manifest.config.get("model", {})
    facts = {
        "checkpoint": str(path),
        "step": f"{manifest.step:,}",
        "tokens": f"{manifest.state['tokens']:,}" if "tokens" in manifest.state else "not recorded",
        "model": " ".join(
            f"{key}={model[key]}"
            for key in ("pattern", "hidden_size", "num_heads", "vocab_size")
            if key in model
        ),
        "parameters": f"{parameters:,} in {len(weights)} tensors",
        "optimizer": f"{len(manifest.tensors) - len(weights)} tensors",
        "size": f"{size / 1e6:,.1f} MB in {len(manifest.files)} files",
        "written by": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    lines = [f"{label:<12}{value}" for label, value in facts.items()]
    lines.append("weights")
    lines += [
        f"  {name:<56} {str(info.dtype).removeprefix('torch.'):<9} {list(info.shape)}"
        for name, info in sorted(weights.items(), key=lambda item: _natural(item[0]))
    ]
    return "\n".join(lines)


def _natural(name: str) -> list:
    """Sort key that puts layer 10 after layer 9."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]


def _read_json(path: Path, *, absent: str) -> Any:
    """Parse a JSON file; CheckpointFormatError (with `absent` if there is no such file)."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointFormatError(f"{path.parent} has no {path.name}: {absent}") from error
    except (OSError, ValueError) as error:
        raise CheckpointFormatError(f"{path} cannot be read: {error}") from error
