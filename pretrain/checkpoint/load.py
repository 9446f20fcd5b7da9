"""Loading: torch.distributed.checkpoint plans, our reader reads.

DCP runs the plan on all ranks and gathers their errors; the rectangles come from
`xlstm_mcore.ckpt_reader`, straight into the caller's tensors.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from pretrain.checkpoint.errors import as_user_error, collective
from xlstm_mcore import ckpt_reader
from xlstm_mcore.ckpt_reader import CheckpointFormatError, CheckpointReader, Chunk, Manifest


def load_checkpoint(
    path: Path | str, chunks: Sequence[Chunk], *, group: dist.ProcessGroup | None = None
) -> Manifest:
    """Fill the tensors of `chunks` in place from the checkpoint folder `path`.

    Called by all ranks of `group` (default: all; without torch.distributed: this process), each
    with the rectangles that it needs, whatever layout wrote them. Only floating point tensors are
    converted, and only to another floating point type. The tensors of a checkpoint that nobody asks
    for are not read, so weights alone can be loaded. Returns the manifest (state, config, step).

    Raises CheckpointError, the same on every rank, if the checkpoint is not sound or a tensor is
    missing or has another shape; some of the tensors may have been overwritten by then.
    """
    planner = _LoadPlanner(chunks)
    reader = _Reader(Path(path), planner)
    with collective(f"loading the checkpoint {path}"):
        dcp.load(
            {}, storage_reader=reader, planner=planner, process_group=group, no_dist=_alone(group)
        )
    return reader.reader.manifest


def find_latest(root: Path | str, *, verify: bool = False) -> Path | None:
    """The newest complete checkpoint of a run folder or `checkpoints` folder, or None.

    Broken ones are named in a warning and passed over; `verify=True` also reads the files and
    compares their hashes. For one process; ranks that must agree use `find_latest_together`.
    """
    return ckpt_reader.find_latest(root, verify=verify)


def find_latest_together(
    root: Path | str, *, verify: bool = False, group: dist.ProcessGroup | None = None
) -> Path | None:
    """`find_latest` by the first rank of `group`; every rank gets its answer, or its error."""
    if _alone(group):
        return find_latest(root, verify=verify)
    first = dist.get_global_rank(group, 0) if group is not None else 0
    answer: list[Any] = [None]
    if dist.get_rank() == first:
        try:
            answer = [find_latest(root, verify=verify)]
        except OSError as error:
            answer = [CheckpointFormatError(f"{root}: {error}")]
    dist.broadcast_object_list(answer, src=first, group=group)
    with as_user_error():
        if isinstance(answer[0], Exception):
            raise answer[0]
    return answer[0]


def resolve(path: Path | str) -> Path:
    """The checkpoint that a user means by a run folder, a `checkpoints` folder or a checkpoint.

    Raises CheckpointError when there is no complete one.
    """
    with as_user_error():
        return ckpt_reader.resolve(path)


def read_manifest(path: Path | str) -> Manifest:
    """The manifest of a checkpoint folder; CheckpointError if it is not complete and sound."""
    with as_user_error():
        return ckpt_reader.read_manifest(path)


def show(path: Path | str) -> str:
    """What a checkpoint (or the newest of a run folder) contains, as text; CheckpointError."""
    with as_user_error():
        return ckpt_reader.show(path)


class _LoadPlanner(LoadPlanner):
    """Asks for the stored pieces that make up each rectangle, and hands out their targets."""

    def __init__(self, chunks: Sequence[Chunk]):
        self.chunks = [chunk for chunk in chunks if chunk.tensor.numel()]
        self.reader: CheckpointReader | None = None

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        """Nothing: the chunks were given to the constructor."""

    def create_local_plan(self) -> LoadPlan:
        """One ReadItem per overlap of a wanted rectangle with a stored one."""
        assert self.reader is not None
        items = []
        for number, chunk in enumerate(self.chunks):
            for stored, inside, target in self.reader.overlaps(chunk):
                items.append(
                    ReadItem(
                        type=LoadItemType.TENSOR,
                        # Several rectangles may share name and offset; the index tells them apart.
                        dest_index=MetadataIndex(chunk.name, chunk.global_offset, number),
                        dest_offsets=torch.Size(t.start for t in target),
                        storage_index=MetadataIndex(chunk.name, stored.offset),
                        storage_offsets=torch.Size(inside),
                        lengths=torch.Size(t.stop - t.start for t in target),
                    )
                )
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Every rank reads what it needs itself."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Never asked for: state is JSON in the manifest."""
        raise AssertionError("checkpoints hold no byte objects")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The part of the caller's tensor that a ReadItem fills."""
        target = self.chunks[read_item.dest_index.index].tensor.detach()
        return target[
            tuple(
                slice(start, start + length)
                for start, length in zip(read_item.dest_offsets, read_item.lengths, strict=True)
            )
        ]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing: the tensor is a view of the caller's."""


class _Reader(StorageReader):
    """DCP's storage interface over `CheckpointReader`; no pickled `.metadata` is ever read."""

    def __init__(self, path: Path, planner: _LoadPlanner):
        self.path = path
        self.planner = planner
        self.problem: CheckpointFormatError | None = None

    def reset(self, checkpoint_id=None) -> None:
        """Nothing: one reader serves one load."""

    def read_metadata(self) -> Metadata:
        """Open the checkpoint. An error here would make DCP look for other files, so it waits."""
        try:
            self.planner.reader = self.reader = CheckpointReader(self.path)
        except CheckpointFormatError as error:
            self.problem = error
        return Metadata(state_dict_metadata={})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Raise what `read_metadata` found."""
        if self.problem is not None:
            raise self.problem
        self.stored = {
            MetadataIndex(name, chunk.offset): chunk
            for name, chunks in self.reader.chunks.items()
            for chunk in chunks
        }

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read each rectangle (only its bytes) and copy it into its target."""
        with self.reader, torch.no_grad():
            for item in plan.items:
                data = self.reader.read_stored(
                    item.storage_index.fqn,
                    self.stored[item.storage_index],
                    item.storage_offsets,
                    item.lengths,
                )
                target = planner.resolve_tensor(item)
                target.copy_(data)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        """Never chosen by DCP itself."""
        return False


def _alone(group: dist.ProcessGroup | None) -> bool:
    """Whether there is no process group to agree with."""
    return group is None and not (dist.is_available() and dist.is_initialized())
