"""Write a safetensors file one tensor at a time.

The safetensors library serialises a dictionary that is wholly in memory. A checkpoint of a large
model must not need that: here the header is computed from shapes first, then the tensors stream
through, so that the peak is one tensor. The hashes of the file and of each tensor are taken on the
way, which saves reading it again. Files written here are read by the safetensors library.

Format: 8 bytes little-endian header length, a JSON header padded with spaces to a multiple of 8,
then the tensors' bytes without gaps (https://github.com/huggingface/safetensors).
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import xxhash

from xlstm_io.storage import Location, RangeReader, file_size, writing

#: torch dtype -> its name in a safetensors header (and in our manifests).
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file to be written: its key, dtype and shape."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class WrittenFile:
    """Size in bytes and xxh3-64 hash (hex) of a file."""

    size: int
    xxh3: str


@dataclass(frozen=True)
class WrittenEntry:
    """First byte of a tensor in its file, and xxh3-64 hash (hex) of its bytes."""

    begin: int
    xxh3: str


def write_safetensors(
    path: Location, entries: Sequence[Entry], tensor_of: Callable[[Entry], torch.Tensor]
) -> tuple[WrittenFile, dict[Entry, WrittenEntry]]:
    """Write `entries` to `path`, asking `tensor_of` for one tensor at a time, durably.

    `tensor_of(entry)` gives a tensor of the entry's dtype and shape on any device and with any
    strides. Returns what was written, as a whole and per entry. Raises OSError as the file system
    does, TypeError for a dtype without a name in safetensors.
    """
    # The widest dtypes first: every tensor then starts at a multiple of its element size.
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.key))
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        if entry.dtype not in DTYPE_NAMES:
            raise TypeError(f"{entry.key}: dtype {entry.dtype} cannot be stored in safetensors")
        end = offset + entry.num_bytes
        header[entry.key] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    digest = xxhash.xxh3_64()
    size = 0
    written = {}
    with writing(path) as file:

        def put(data) -> None:
            nonlocal size
            file.write(data)
            digest.update(data)
            size += len(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        staging = torch.empty(0, dtype=torch.uint8)  # used again: one entry is held, not two
        for entry in ordered:
            tensor = tensor_of(entry).detach()
            assert tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape, entry
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                if staging.numel() < entry.num_bytes:
                    staging = torch.empty(entry.num_bytes, dtype=torch.uint8)
                here = view_as(staging, entry.dtype, entry.shape)
                tensor = here.copy_(tensor)
            data = bytes_of(tensor)
            written[entry] = WrittenEntry(size, xxhash.xxh3_64_hexdigest(data))
            put(data)
    return WrittenFile(size, digest.hexdigest()), written


def hash_file(path: Location) -> WrittenFile:
    """Size and xxh3-64 of an existing file, read in blocks of 4 MiB."""
    digest = xxhash.xxh3_64()
    size = file_size(path)
    reader = RangeReader()
    buffer = memoryview(bytearray(min(size, 1 << 22)))
    try:
        for begin in range(0, size, len(buffer) or 1):
            block = buffer[: size - begin]
            reader.read_into(path, begin, block)
            digest.update(block)
    finally:
        reader.close()
    return WrittenFile(size, digest.hexdigest())


def view_as(memory: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """The first bytes of a flat uint8 tensor as a contiguous tensor of `dtype` and `shape`."""
    return memory[: math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as a flat buffer of bytes."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())
