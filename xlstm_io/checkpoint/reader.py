"""Reading slices of a checkpoint's tensors, whatever layout wrote them.

    with CheckpointReader(resolve("runs/demo")) as reader:
        weight = reader.read("decoder.final_norm.weight")

The format is described in `xlstm_io.checkpoint.manifest`. A tensor lies in stored slices of at most
`STORED_SLICE_BYTES`. A stored slice is read as a range of bytes, its hash is compared, and the part
that is wanted is copied into place. So at most one stored slice is held, the rest of a stored slice
is all that is read without being needed, and every byte that is used is the one that was written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from xlstm_io.checkpoint.manifest import (
    METADATA_NAME,
    TensorInfo,
    read_json,
    read_manifest,
)
from xlstm_io.checkpoint.safetensors_stream import bytes_of, hash_file, view_as
from xlstm_io.checkpoint.schema import parse_sizes
from xlstm_io.errors import CheckpointDamagedError, CheckpointError
from xlstm_io.storage import Location, RangeReader, location
from xlstm_io.terminal import shortened

#: Saving cuts slices into stored slices of at most this size (one row may be larger). It is small
#: enough that reading a part of a tensor reads little else, and large enough for full speed.
STORED_SLICE_BYTES = 16 << 20

MOST_COMPARED = 50_000_000
"""Comparisons of slices after which a tensor is refused: half a minute; a file can ask for days."""


@dataclass(frozen=True)
class TensorSlice:
    """A slice of a global tensor and the local memory that holds it.

    Attributes:
        name: Global name of the tensor.
        global_shape: Shape of the global tensor.
        global_offset: First element of the slice in the global tensor, per dimension.
        tensor: A view with the shape of the slice, on any device, with any strides. Saving reads
            it, loading copies into it in place.

    Raises:
        CheckpointError: The slice does not lie inside the global shape.
    """

    name: str
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    tensor: torch.Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.tensor.shape)
        fits = len(self.global_shape) == len(self.global_offset) == len(shape) and all(
            0 <= o and o + s <= g
            for o, s, g in zip(self.global_offset, shape, self.global_shape, strict=True)
        )
        if not fits:
            raise CheckpointError(
                f"{self.name}: a slice of shape {list(shape)} at {list(self.global_offset)} does "
                f"not lie inside the tensor's shape {list(self.global_shape)}"
            )


@dataclass(frozen=True)
class StoredSlice:
    """A slice of a global tensor as it lies in a file, contiguous from byte `begin` on.

    Attributes:
        offset: First element of the slice in the global tensor, per dimension.
        shape: Shape of the slice.
        file: Name of the file in the checkpoint's folder.
        begin: First byte in the file.
        xxh3: Hash of the bytes (xxh3-64, hex).
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    begin: int
    xxh3: str


class CheckpointReader:
    """Reads slices of a checkpoint's tensors, and holds one stored slice at a time.

    Use it as a context manager.

    Args:
        path: The checkpoint's folder.
        check_files: Whether the sizes of all its files are compared first. There is a file for each
            rank that saved, so of many processes that read a checkpoint together one does that.

    Attributes:
        manifest: What the manifest says.
        stored: The stored slices of each tensor, by its name.

    Raises:
        CheckpointDamagedError: The checkpoint is not sound (also from reading).
        CheckpointError: It does not hold a tensor or slice that is asked for (from reading).
        OSError: The file system refuses (also from reading).
    """

    def __init__(self, path: Location | str, *, check_files: bool = True) -> None:
        self.path = location(path)
        self.manifest = read_manifest(self.path, check_files=check_files)
        metadata_file = self.path / METADATA_NAME
        if METADATA_NAME not in self.manifest.files:
            raise CheckpointDamagedError(f"{self.path}: the manifest does not list {METADATA_NAME}")
        # This file decides which bytes go where; theirs are checked as they are read.
        if hash_file(metadata_file) != self.manifest.files[METADATA_NAME]:
            raise CheckpointDamagedError(f"{metadata_file} does not match its hash in the manifest")
        self.stored = self._parse_stored(read_json(metadata_file))
        self._ranges = RangeReader()
        self._memory = torch.empty(0, dtype=torch.uint8)  # one stored slice, used again
        self._kept: StoredSlice | None = None  # what is in it; neighbours often share one

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ranges.close()
        self._kept, self._memory = None, self._memory[:0]

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a global tensor.

        Raises:
            CheckpointError: The checkpoint does not hold it.
        """
        if name not in self.manifest.tensors:
            raise CheckpointError(f"{self.path} does not hold the tensor {name}")
        return self.manifest.tensors[name]

    def read(self, name: str, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole tensor `name`, on the CPU, in its own dtype or in `dtype`."""
        info = self.info(name)
        tensor = torch.empty(info.shape, dtype=dtype or info.dtype)
        self.read_into(TensorSlice(name, info.shape, (0,) * len(info.shape), tensor))
        return tensor

    @torch.no_grad()
    def read_into(self, part: TensorSlice) -> None:
        """Copy what the checkpoint holds of the slice `part` into its tensor."""
        tensor = part.tensor.detach()
        for stored, inside, target in self.overlaps(part):
            into = tensor[target] if target else tensor
            whole = tuple(into.shape) == stored.shape
            direct = into.device.type == "cpu" and into.dtype == self.info(part.name).dtype
            if whole and direct and into.is_contiguous():
                self._read_stored(part.name, stored, into)
                continue
            values = self._read_kept(part.name, stored)
            index = tuple(slice(o, o + s) for o, s in zip(inside, into.shape, strict=True))
            into.copy_(values[index] if index else values)

    def overlaps(
        self, part: TensorSlice
    ) -> list[tuple[StoredSlice, tuple[int, ...], tuple[slice, ...]]]:
        """Where a slice lies in the files.

        Returns:
            For each stored slice that overlaps it: the stored slice, the offset of the overlap in
            it, and the index of the overlap in the slice's tensor.

        Raises:
            CheckpointError: The tensor is missing, or has another global shape or another kind of
                dtype.
        """
        info = self.info(part.name)
        if info.shape != tuple(part.global_shape):
            raise CheckpointError(
                f"{part.name}: the checkpoint has shape {list(info.shape)}, this model needs "
                f"{list(part.global_shape)} ({self.path})"
            )
        if info.dtype.is_floating_point != part.tensor.dtype.is_floating_point:
            raise CheckpointError(
                f"{part.name}: the checkpoint has {info.dtype}, this model needs "
                f"{part.tensor.dtype} ({self.path})"
            )
        found = []
        for stored in self.stored.get(part.name, ()):
            inside, target = [], []
            for (s_off, s_len), (c_off, c_len) in zip(
                zip(stored.offset, stored.shape, strict=True),
                zip(part.global_offset, part.tensor.shape, strict=True),
                strict=True,
            ):
                start, stop = max(s_off, c_off), min(s_off + s_len, c_off + c_len)
                if start >= stop:
                    break
                inside.append(start - s_off)
                target.append(slice(start - c_off, stop - c_off))
            else:
                found.append((stored, tuple(inside), tuple(target)))
        return found

    def _read_kept(self, name: str, stored: StoredSlice) -> torch.Tensor:
        """A stored slice in this reader's own memory; valid until the next call."""
        dtype = self.info(name).dtype
        size = math.prod(stored.shape) * dtype.itemsize
        if self._memory.numel() < size:
            self._kept, self._memory = None, torch.empty(size, dtype=torch.uint8)
        values = view_as(self._memory, dtype, stored.shape)
        if self._kept is not stored:
            self._kept = None  # should the read fail
            self._read_stored(name, stored, values)
            self._kept = stored
        return values

    def _read_stored(self, name: str, stored: StoredSlice, into: torch.Tensor) -> None:
        """Fill the contiguous CPU tensor `into` with a stored slice, and compare its hash."""
        data = bytes_of(into)
        file = self.path / stored.file
        self._ranges.read_into(file, stored.begin, data)
        if xxhash.xxh3_64_hexdigest(data) != stored.xxh3:
            raise CheckpointDamagedError(
                f"{file}: {name} at {list(stored.offset)} does not match its hash: it is corrupted"
            )

    def _parse_stored(self, body: Any) -> dict[str, list[StoredSlice]]:
        """The stored slices of each tensor; they must hold each of its elements exactly once."""
        file = self.path / METADATA_NAME
        stored: dict[str, list[StoredSlice]] = {}
        left = {name: written.size for name, written in self.manifest.files.items()}
        try:
            for name, info in self.manifest.tensors.items():
                stored[name] = []
                for offset, shape, where, begin, xxh3 in body["tensors"][name]:
                    if type(begin) is not int:
                        raise ValueError(f"{name}: {begin!r} is not a place in a file")
                    part = StoredSlice(
                        parse_sizes(offset), parse_sizes(shape), where, begin, str(xxh3)
                    )
                    size = math.prod(part.shape) * info.dtype.itemsize
                    # No byte counts twice, so that a small file cannot claim a huge tensor.
                    left[part.file] -= size
                    if not 0 <= part.begin <= self.manifest.files[part.file].size - size:
                        raise ValueError(f"{name}: {part} lies outside its file")
                    if left[part.file] < 0:
                        raise ValueError(f"{name}: {part.file} is too small for what it holds")
                    stored[name].append(part)
                check_exact_cover(name, info.shape, [(p.offset, p.shape, 0) for p in stored[name]])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointDamagedError(
                f"{file} does not describe the tensors: {shortened(str(error))}"
            ) from error
        return stored


def check_exact_cover(
    name: str, shape: Sequence[int], slices: Sequence[tuple[Sequence[int], Sequence[int], int]]
) -> None:
    """Check that slices from all ranks hold every element of a tensor exactly once.

    Slices are compared in a sweep along the axis with the most cuts. Where they come from cutting a
    tensor into slices or flat ranges, only neighbours are compared, so thousands are cheap.

    Args:
        name: Name of the tensor, for messages.
        shape: Its shape.
        slices: `(offset, shape, rank)` of each slice.

    Raises:
        CheckpointError: Slices overlap, leave something out, or do not lie in the shape.
    """
    total = 0
    for offset, size, rank in slices:
        if not len(offset) == len(size) == len(shape) or not all(
            0 <= o and 0 < s and o + s <= g for o, s, g in zip(offset, size, shape, strict=True)
        ):
            raise CheckpointError(
                f"{name}: the slice {list(size)} at {list(offset)} of rank {rank} does not lie in "
                f"its shape {list(shape)}"
            )
        total += math.prod(size)
    axis = max(range(len(shape)), key=lambda a: len({o[a] for o, _, _ in slices}), default=None)
    if axis is not None:
        active: list[tuple[Sequence[int], Sequence[int], int]] = []
        compared = 0
        for part in sorted(slices, key=lambda p: p[0][axis]):
            offset, size, rank = part
            compared += len(active)
            if compared > MOST_COMPARED:
                raise CheckpointError(f"{name}: too many of its slices lie side by side")
            active = [p for p in active if p[0][axis] + p[1][axis] > offset[axis]]
            for other_offset, other_size, other_rank in active:
                if all(
                    a < b + t and b < a + s
                    for a, s, b, t in zip(offset, size, other_offset, other_size, strict=True)
                ):
                    raise CheckpointError(
                        f"{name}: the slice {list(size)} at {list(offset)} of rank {rank} overlaps "
                        f"the slice {list(other_size)} at {list(other_offset)} of rank {other_rank}"
                    )
            active.append(part)
    if total != math.prod(shape):
        raise CheckpointError(
            f"{name}: the slices given by all ranks hold {total} of its {math.prod(shape)} elements"
        )
