"""Write a safetensors file one tensor at a time.

The safetensors library serialises a dictionary of tensors that are all in memory. A checkpoint of a
large model must not need that. Here the header is computed from shapes first, and then the tensors
are written one after the other, so at most one is held. The hashes of the file and of each tensor
are computed on the way, so the file is not read again. The safetensors library reads these files.

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
class TensorHeader:
    """What a file's header says about a tensor: its key, dtype and shape."""

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
class WrittenTensor:
    """Where a tensor lies in its file (its first byte), and the xxh3-64 hash (hex) of its bytes."""

    begin: int
    xxh3: str


def write_safetensors(
    path: Location,
    headers: Sequence[TensorHeader],
    tensor_of: Callable[[TensorHeader], torch.Tensor],
) -> tuple[WrittenFile, dict[TensorHeader, WrittenTensor]]:
    """Write tensors to a file durably, asking for one at a time.

    Args:
        path: The file.
        headers: What it holds.
        tensor_of: Returns the tensor of a header, with its dtype and shape, on any device and with
            any strides.

    Returns:
        What was written: the file, and each tensor.

    Raises:
        OSError: As the file system does.
        TypeError: A dtype has no name in safetensors.
    """
    # The widest dtypes first: every tensor then starts at a multiple of its element size.
    ordered = sorted(headers, key=lambda header: (-header.dtype.itemsize, header.key))
    listing: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for header in ordered:
        if header.dtype not in DTYPE_NAMES:
            raise TypeError(f"{header.key}: dtype {header.dtype} cannot be stored in safetensors")
        end = offset + header.num_bytes
        listing[header.key] = {
            "dtype": DTYPE_NAMES[header.dtype],
            "shape": list(header.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(listing, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    digest = xxhash.xxh3_64()
    size = 0
    written = {}
    with writing(path) as file:

        def put(data: bytes | memoryview) -> None:
            nonlocal size
            file.write(data)
            digest.update(data)
            size += len(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        staging = torch.empty(0, dtype=torch.uint8)  # used again: one tensor is held, not two
        for header in ordered:
            tensor = tensor_of(header).detach()
            assert tensor.dtype == header.dtype and tuple(tensor.shape) == header.shape, header
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                if staging.numel() < header.num_bytes:
                    staging = torch.empty(header.num_bytes, dtype=torch.uint8)
                here = view_as(staging, header.dtype, header.shape)
                tensor = here.copy_(tensor)
            data = bytes_of(tensor)
            written[header] = WrittenTensor(size, xxhash.xxh3_64_hexdigest(data))
            put(data)
    return WrittenFile(size, digest.hexdigest()), written


def hash_file(path: Location) -> WrittenFile:
    """Size and xxh3-64 of an existing file, read 4 MiB at a time."""
    digest = xxhash.xxh3_64()
    size = file_size(path)
    reader = RangeReader()
    buffer = memoryview(bytearray(min(size, 1 << 22)))
    try:
        for begin in range(0, size, len(buffer) or 1):
            data = buffer[: size - begin]
            reader.read_into(path, begin, data)
            digest.update(data)
    finally:
        reader.close()
    return WrittenFile(size, digest.hexdigest())


def view_as(memory: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """The first bytes of a flat uint8 tensor as a contiguous tensor of `dtype` and `shape`."""
    return memory[: math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as a flat buffer of bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
