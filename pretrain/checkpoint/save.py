"""Saving: every rank writes its rectangles to one file, then the coordinator the manifest.

torch.distributed.checkpoint (DCP) exchanges the plans and gathers errors, so that a full disk on
one rank is the same error on all of them. Its own storage writers do not serve here: the
safetensors one keys tensors by name alone, so two rectangles of one tensor in one file overwrite
each other, and it holds the whole file in memory; the other one pickles.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import platform
import secrets
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from pretrain.checkpoint.errors import CheckpointError, collective
from xlstm_mcore.ckpt_reader import (
    FOLDER_NAME,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_NAME,
    METADATA_NAME,
    Chunk,
    chunk_key,
    complete_checkpoints,
    manifest_checksum,
    step_folder_name,
)
from xlstm_mcore.safetensors_stream import (
    DTYPE_NAMES,
    Entry,
    WrittenFile,
    hash_file,
    write_safetensors,
)

log = logging.getLogger(__name__)


def save_checkpoint(
    root: Path | str,
    chunks: Sequence[Chunk],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    step: int,
    group: dist.ProcessGroup | None = None,
    keep: int | None = None,
) -> Path:
    """Save a checkpoint under `root`/checkpoints and return its folder.

    Called by all ranks of `group` (default: all; without torch.distributed: this process). Each
    passes the rectangles that it alone owns: together they must cover every tensor exactly once.
    `state` and `config` are JSON (the first rank's are stored). No rank holds more than one
    rectangle besides what it was given. Afterwards all but the newest `keep` complete checkpoints
    are deleted (None: all are kept); incomplete ones are left for a person to look at.

    Raises CheckpointError, the same on every rank, if the file system refuses, if pieces overlap or
    are missing, or if `state` or `config` is not JSON. Earlier checkpoints are untouched then, and
    the incomplete attempt is removed.
    """
    if keep is not None and keep < 1:
        raise CheckpointError(f"checkpoint.keep={keep} would delete what was just saved; use >= 1")
    folder = Path(root) / FOLDER_NAME
    writer = _Writer(folder, step, state, config)
    no_dist = group is None and not (dist.is_available() and dist.is_initialized())
    try:
        with collective(
            f"saving the checkpoint of step {step}",
            f"; nothing was saved, earlier checkpoints in {folder} are as they were",
        ):
            dcp.save(
                {},
                storage_writer=writer,
                planner=_SavePlanner(chunks),
                process_group=group,
                no_dist=no_dist,
            )
    except CheckpointError:  # all ranks know, so nobody is writing any more
        writer.discard()
        raise
    assert writer.path is not None
    if keep is not None and writer.is_coordinator:
        _apply_retention(folder, keep, writer.path)
    return writer.path


def check_exact_cover(
    name: str, shape: Sequence[int], pieces: Sequence[tuple[Sequence[int], Sequence[int], int]]
) -> None:
    """Raise CheckpointError unless `pieces` (offset, shape, rank) tile a tensor exactly once.

    A sweep along the axis with the most cuts: for slices and flat ranges only neighbours are
    compared, so thousands of pieces are cheap.
    """
    total = sum(math.prod(size) for _, size, _ in pieces)
    axis = max(range(len(shape)), key=lambda a: len({o[a] for o, _, _ in pieces}), default=None)
    if axis is not None:
        active: list[tuple[Sequence[int], Sequence[int], int]] = []
        for piece in sorted(pieces, key=lambda p: p[0][axis]):
            offset, size, rank = piece
            active = [p for p in active if p[0][axis] + p[1][axis] > offset[axis]]
            for other_offset, other_size, other_rank in active:
                if all(
                    a < b + t and b < a + s
                    for a, s, b, t in zip(offset, size, other_offset, other_size, strict=True)
                ):
                    raise CheckpointError(
                        f"{name}: the piece {list(size)} at {list(offset)} of rank {rank} overlaps "
                        f"the piece {list(other_size)} at {list(other_offset)} of rank {other_rank}"
                    )
            active.append(piece)
    if total != math.prod(shape):
        raise CheckpointError(
            f"{name}: the pieces given by all ranks hold {total} of its {math.prod(shape)} elements"
        )


class _SavePlanner(SavePlanner):
    """Turns this rank's chunks into write items; the coordinator checks that they fit together."""

    def __init__(self, chunks: Sequence[Chunk]):
        self.chunks: dict[MetadataIndex, Chunk] = {}
        self.given = [chunk for chunk in chunks if chunk.tensor.numel()]

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None:
        """Nothing: the chunks were given to the constructor."""

    def create_local_plan(self) -> SavePlan:
        """One item per chunk."""
        items = []
        for chunk in self.given:
            index = MetadataIndex(chunk.name, chunk.global_offset)
            if index in self.chunks:
                raise CheckpointError(f"{chunk.name}: two pieces at {list(chunk.global_offset)}")
            self.chunks[index] = chunk
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(torch.Size(chunk.global_offset), chunk.tensor.shape),
                properties=TensorProperties(dtype=chunk.tensor.dtype),
                size=torch.Size(chunk.global_shape),
            )
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Check that every tensor is described alike by all ranks and covered exactly once."""
        tensors: dict[str, TensorStorageMetadata] = {}
        pieces: dict[str, list] = defaultdict(list)
        for rank, plan in enumerate(all_plans):
            for item in plan.items:
                name, data = item.index.fqn, item.tensor_data
                dtype = data.properties.dtype
                if dtype not in DTYPE_NAMES:
                    raise CheckpointError(f"{name}: dtype {dtype} is not in the checkpoint format")
                known = tensors.setdefault(
                    name, TensorStorageMetadata(data.properties, data.size, [])
                )
                if (known.size, known.properties.dtype) != (data.size, dtype):
                    raise CheckpointError(
                        f"{name}: rank {rank} has {list(data.size)} {dtype}, other ranks have "
                        f"{list(known.size)} {known.properties.dtype}"
                    )
                known.chunks.append(data.chunk)
                pieces[name].append((data.chunk.offsets, data.chunk.sizes, rank))
        for name, tensor in tensors.items():
            check_exact_cover(name, tensor.size, pieces[name])
        return all_plans, Metadata(state_dict_metadata=dict(sorted(tensors.items())))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The tensor of an item."""
        return self.chunks[write_item.index].tensor


@dataclasses.dataclass(frozen=True)
class _Placed:
    """In which file a chunk went, with that file's size and hash."""

    file: str
    written: WrittenFile


class _Writer(StorageWriter):
    """One streamed safetensors file per rank, JSON metadata, and the manifest last."""

    def __init__(self, folder: Path, step: int, state: Mapping, config: Mapping):
        self.folder = folder
        self.step, self.state, self.config = step, state, config
        self.path: Path | None = None
        self.is_coordinator = False

    def reset(self, checkpoint_id=None) -> None:
        """Nothing: one writer serves one save."""

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        """Remember the role."""
        self.is_coordinator = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator: create the attempt's folder and give each rank its file."""
        for name, value in (("state", self.state), ("config", self.config)):
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"the {name} to be saved is not JSON: {error}") from error
        path = self.folder / step_folder_name(self.step, secrets.token_hex(4))
        path.mkdir(parents=True)
        self.path = path
        return [
            dataclasses.replace(plan, storage_data=(path, f"data-{rank:05d}.safetensors"))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Stream this rank's chunks into its file."""
        self.path, file_name = plan.storage_data
        results = []
        if plan.items:
            entries = {
                Entry(
                    chunk_key(item.index.fqn, item.index.offset),
                    item.tensor_data.properties.dtype,
                    tuple(item.tensor_data.chunk.sizes),
                ): item
                for item in plan.items
            }
            written = write_safetensors(
                self.path / file_name,
                list(entries),
                lambda entry: planner.resolve_data(entries[entry]),
            )
            results = [
                WriteResult(item.index, entry.num_bytes, _Placed(file_name, written))
                for entry, item in entries.items()
            ]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, when all data is on disk: metadata, then the manifest."""
        placed = {result.index: result.storage_data for rank in results for result in rank}
        rows = {
            name: [
                [list(c.offsets), list(c.sizes), placed[MetadataIndex(name, c.offsets)].file]
                for c in tensor.chunks
            ]
            for name, tensor in metadata.state_dict_metadata.items()
        }
        _write_json(self.path / METADATA_NAME, {"tensors": rows})
        files = {METADATA_NAME: hash_file(self.path / METADATA_NAME)}
        files |= {place.file: place.written for place in placed.values()}
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "complete": True,
            "step": self.step,
            "created": time.time(),
            "versions": _versions(),
            "state": self.state,
            "config": self.config,
            "files": {name: dataclasses.asdict(files[name]) for name in sorted(files)},
            "tensors": {
                name: {
                    "shape": list(tensor.size),
                    "dtype": DTYPE_NAMES[tensor.properties.dtype],
                }
                for name, tensor in metadata.state_dict_metadata.items()
            },
        }
        # The checksum is over what a reader will parse (tuples are lists by then).
        manifest = json.loads(json.dumps(manifest))
        manifest["checksum"] = manifest_checksum(manifest)
        _sync_folder(self.path)
        _write_json(self.path / MANIFEST_NAME, manifest, indent=1)
        _sync_folder(self.path)
        _sync_folder(self.folder)

    def discard(self) -> None:
        """On the coordinator after a failure: remove the incomplete attempt, to free its space."""
        if self.is_coordinator and self.path is not None:
            log.warning("removing the incomplete attempt %s", self.path)
            try:
                shutil.rmtree(self.path)
            except OSError as error:
                log.warning("could not remove %s: %s", self.path, error)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        """Never chosen by DCP itself."""
        return False


def _apply_retention(folder: Path, keep: int, just_saved: Path) -> None:
    """Delete complete checkpoints beyond the newest `keep`, never the one just saved.

    The manifest goes first: a deletion that is interrupted leaves nothing that looks complete.
    """
    complete, _ = complete_checkpoints(folder)
    for path in complete[keep:]:
        if path == just_saved:  # the run went back to an earlier step; that is what it wants now
            continue
        try:
            (path / MANIFEST_NAME).unlink()
            shutil.rmtree(path)
        except OSError as error:
            log.warning("could not delete the old checkpoint %s: %s", path, error)


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


def _write_json(path: Path, body: Any, indent: int | None = None) -> None:
    """Write JSON so that `path` is either absent or whole: temporary file, fsync, rename."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(body, file, indent=indent)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _sync_folder(path: Path) -> None:
    """Make the folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
