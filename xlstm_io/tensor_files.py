"""Tensors in files that somebody else wrote: safetensors, and pickles of torch.

    with open_tensors(location("s3://bucket/model")) as tensors:
        tensors.infos["lm_head.weight"]   # shape and dtype, nothing is read yet
        tensors.read("lm_head.weight")

Nothing in such a file is believed. Headers have a largest size, offsets must lie in the file, names
of files must stay in the folder, and no more memory is taken than the files have bytes. Pickles
(`.bin`, `.pt`) are read by torch's weights-only loading alone, which builds tensors and runs no
code, after the archive around them was looked at.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xlstm_io.checkpoint.manifest import TensorInfo
from xlstm_io.checkpoint.safetensors_stream import DTYPES, bytes_of
from xlstm_io.checkpoint.schema import parse_sizes
from xlstm_io.errors import UserError
from xlstm_io.foreign.json_file import parse_json
from xlstm_io.foreign.untrusted import check_name, inside
from xlstm_io.storage import (
    Location,
    RangeReader,
    exists,
    file_size,
    file_version,
    is_folder,
    read_file,
)
from xlstm_io.terminal import one_line

HEADER_BYTES = 100_000_000
"""Largest header of a safetensors file; the library's own limit."""
JSON_BYTES = 100_000_000
PICKLE_BYTES = 64_000_000
"""Largest pickle in an archive of torch: it names the tensors, whose bytes lie beside it."""

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class TensorFileError(UserError):
    """A file of tensors is not what it claims to be; the message names it.

    Names of tensors and files that the file says are spelled out where they are not printable.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class TensorFiles(ABC):
    """Tensors by name, read when they are asked for.

    Attributes:
        files: where they lie.
        infos: shape and dtype of every tensor.
    """

    files: list[Location]
    infos: dict[str, TensorInfo]

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """A tensor on the CPU, in its own dtype.

        Raises:
            TensorFileError: the file changed, or cannot be read.
        """

    @abstractmethod
    def close(self) -> None:
        """Close what is open."""

    def version(self) -> str:
        """A text that changes when one of the files is written again.

        Raises:
            TensorFileError: a file is gone.
        """
        try:
            return json.dumps([[str(file), file_version(file)] for file in self.files])
        except OSError as error:
            raise TensorFileError(f"{error}") from error


def open_tensors(path: Location) -> TensorFiles:
    """The tensors of a file, or of a folder as transformers writes it, local or behind a URL.

    In a folder safetensors are taken before pickles, and an index before a single file.

    Raises:
        TensorFileError: there are none, or a file is not sound.
    """
    try:
        return _open(path)
    except OSError as error:
        raise TensorFileError(f"{error}") from error


def _open(path: Location) -> TensorFiles:
    if not is_folder(path):
        if not exists(path):
            raise TensorFileError(f"{path}: no such file or folder")
        return _open_files([path])
    for index, whole in zip(_INDEXES, _WHOLE, strict=True):
        if exists(path / index):
            return _open_index(path, path / index)
        if exists(path / whole):
            return _open_files([_place(path, whole, path)])
    raise TensorFileError(f"{path} has no {_WHOLE[0]}, {_WHOLE[1]} or index of several of them")


def read_json_file(path: Location) -> dict[str, Any]:
    """A JSON object that somebody else wrote.

    Raises:
        TensorFileError: the file cannot be read, is too large, or holds something else.
    """
    try:
        value = parse_json(read_file(path, JSON_BYTES, links=True))
    except FileNotFoundError as error:
        raise TensorFileError(f"{path}: no such file") from error
    except OSError as error:
        raise TensorFileError(str(error)) from error
    except ValueError as error:
        raise TensorFileError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TensorFileError(f"{path} does not hold a JSON object")
    return value


def _place(folder: Location, name: object, named_in: Location) -> Location:
    """The file that a name in a folder means, links followed.

    Links must stay in the folder, or, in the cache of the Hugging Face hub, in its snapshot's
    repository.
    """
    if not isinstance(folder, Path):
        return inside(folder, name, named_in=named_in, error=TensorFileError)
    text = check_name(name, named_in=named_in, error=TensorFileError)
    base = folder.parents[1] if folder.parent.name == "snapshots" else folder
    real, root = os.path.realpath(folder / text), os.path.realpath(base)
    if os.path.commonpath([real, root]) != root:
        raise TensorFileError(
            f"{named_in} names a file outside its folder: {text!r} (a link leads to {real}); put "
            "the file itself there"
        )
    return Path(real)


def _open_index(folder: Location, index: Location) -> TensorFiles:
    weight_map = read_json_file(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise TensorFileError(f"{index} has no weight_map")
    files = [_place(folder, name, index) for name in dict.fromkeys(map(str, weight_map.values()))]
    tensors = _open_files(files)
    missing = sorted(set(weight_map) - set(tensors.infos))
    if missing:
        tensors.close()
        raise TensorFileError(f"{index} names {missing[0]}, which its files do not hold")
    return tensors


def _open_files(files: list[Location]) -> TensorFiles:
    for file in files:
        if not (file.is_file() if isinstance(file, Path) else exists(file)):
            raise TensorFileError(f"{file} is missing")
    if not any(file.name.endswith(_PICKLES) for file in files):
        return _Safetensors(files)
    local = [file for file in files if isinstance(file, Path)]
    if len(local) < len(files):
        raise TensorFileError(
            f"{files[0]}: an archive of torch.save is read from a local folder alone; copy it "
            "there, or convert it to safetensors"
        )
    return _Pickles(local)


class _Safetensors(TensorFiles):
    """Safetensors files; their bytes are read when a tensor is."""

    def __init__(self, files: list[Location]) -> None:
        self.files, self.infos = files, {}
        self._places: dict[str, tuple[Location, int]] = {}
        self._ranges = RangeReader()
        for file in files:
            for name, (info, begin) in _header(file, self._ranges).items():
                if name in self.infos:
                    raise TensorFileError(f"{file} holds {name} a second time")
                self.infos[name] = info
                self._places[name] = file, begin

    def read(self, name: str) -> torch.Tensor:
        file, begin = self._places[name]
        info = self.infos[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        try:
            if tensor.numel():
                self._ranges.read_into(file, begin, bytes_of(tensor))
        except OSError as error:
            raise TensorFileError(f"{file}: {name} cannot be read: {error}") from error
        return tensor

    def close(self) -> None:
        self._ranges.close()


def _header(file: Location, ranges: RangeReader) -> dict[str, tuple[TensorInfo, int]]:
    """Each tensor of a safetensors file with its first byte."""
    try:
        size = file_size(file)
        length = bytearray(8)
        ranges.read_into(file, 0, memoryview(length))
        header_bytes = int.from_bytes(length, "little")
        if header_bytes > min(HEADER_BYTES, size - 8):
            raise TensorFileError(
                f"{file} is not a safetensors file: its header would have {header_bytes} bytes"
            )
        text = bytearray(header_bytes)
        ranges.read_into(file, 8, memoryview(text))
        header = parse_json(bytes(text))
        header.pop("__metadata__", None)
        found, data = {}, size - 8 - header_bytes
        for name, entry in header.items():
            shape, dtype = parse_sizes(entry["shape"]), DTYPES.get(entry["dtype"])
            first, last = entry["data_offsets"]
            if dtype is None:
                raise TensorFileError(f"{file}: {name} has the dtype {entry['dtype']!r}")
            if type(first) is not int or type(last) is not int or not 0 <= first <= last <= data:
                raise TensorFileError(f"{file}: {name} lies outside the file")
            if last - first != math.prod(shape) * dtype.itemsize:
                raise TensorFileError(
                    f"{file}: {name} has {last - first} bytes, which is not {list(shape)} of "
                    f"{entry['dtype']}"
                )
            found[name] = TensorInfo(shape, dtype), 8 + header_bytes + first
    except OSError as error:
        raise TensorFileError(f"{file} cannot be read: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, TensorFileError):
            raise
        raise TensorFileError(f"{file} is not a safetensors file: {error!r}") from error
    if sum(math.prod(i.shape) * i.dtype.itemsize for i, _ in found.values()) > data:
        raise TensorFileError(f"{file}: tensors overlap")
    return found


class _Pickles(TensorFiles):
    """Archives that torch.save wrote; the operating system maps their bytes into memory."""

    def __init__(self, files: list[Path]) -> None:
        self.files = list(files)
        self._tensors: dict[str, torch.Tensor] = {}
        for file in files:
            tensors = _unpickled(file)
            for name in tensors.keys() & self._tensors.keys():
                raise TensorFileError(f"{file} holds {name} a second time")
            self._tensors |= tensors
        self.infos = {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach().contiguous()

    def close(self) -> None:
        self._tensors.clear()


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one archive, by weights-only loading."""
    size = _check_archive(file)
    try:
        value = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # it raises UnpicklingError, RuntimeError, and what pickles cause
        first = str(error).split("\n")[0][:200]
        raise TensorFileError(
            f"{file} holds more than tensors, or is damaged ({first}); nothing of it was run; "
            "convert it to safetensors where you trust it"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(value, Mapping) and isinstance(value.get(wrapper), Mapping):
            value = value[wrapper]
            break
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise TensorFileError(f"{file} is not a state dict: tensors by name")
    tensors = {name: tensor for name, tensor in value.items() if isinstance(tensor, torch.Tensor)}
    for name, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        # A view with a stride of 0 may claim any size.
        if not plain or tensor.numel() * tensor.element_size() > size:
            raise TensorFileError(f"{file}: {name} is not a tensor that the file has the bytes of")
    return tensors


def _check_archive(file: Path) -> int:
    """Bytes of a file, once its archive is known to hold no more than these."""
    try:
        size = file.stat().st_size
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except OSError as error:
        raise TensorFileError(f"{file} cannot be read: {error}") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise TensorFileError(
            f"{file} is not an archive of torch.save since version 1.6; convert it to safetensors"
        ) from error
    pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > size:
        raise TensorFileError(f"{file} is compressed, which torch.save never does; it is not read")
    if len(pickles) != 1 or pickles[0].file_size > PICKLE_BYTES:
        raise TensorFileError(f"{file} is not an archive of torch.save with one pickle")
    return size
