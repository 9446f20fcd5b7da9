"""Documents out of Megatron-LM's tokenized corpora: PREFIX.idx and PREFIX.bin.

Layout of the index, little-endian: 9 bytes of magic, version 1 (8 bytes), a code of the tokens'
type (1 byte), the numbers of sequences and of document bounds (8 bytes each); then int32 sizes of
the sequences, int64 offsets of them in the .bin, and int64 document bounds, which count sequences.
Source: megatron/core/datasets/indexed_dataset.py of megatron-core 0.16.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from xlstm_io.errors import PrepError
from xlstm_io.storage import file_size

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\0\0"
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class MegatronCorpus:
    """The documents of PREFIX.idx and PREFIX.bin, mapped from disk.

    Args:
        prefix: path without `.idx` or `.bin`.

    Attributes:
        bin: the file of tokens.
        dtype: type of its tokens.

    Raises:
        PrepError: the files are missing, or not what Megatron-LM writes.
    """

    def __init__(self, prefix: str):
        index, self.bin = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        try:
            file_size(index, links=True)  # mapping a pipe would wait
            raw = np.memmap(index, np.uint8, "r")
            size = file_size(self.bin, links=True)
        except (OSError, ValueError) as error:
            raise PrepError(
                f"{prefix}: cannot be read ({error}); give the path without .idx and .bin"
            ) from None
        if len(raw) < _HEADER.size:
            raise PrepError(f"{index}: not an index of Megatron-LM: too short")
        magic, version, code, sequences, bounds = _HEADER.unpack(bytes(raw[: _HEADER.size]))
        if magic != _MAGIC or version != 1 or code not in _TYPES:
            raise PrepError(
                f"{index}: not an index of Megatron-LM with whole numbers as tokens (version "
                f"{version}, type {code})"
            )
        self.dtype = np.dtype(_TYPES[code])
        if len(raw) < _HEADER.size + 12 * sequences + 8 * bounds:
            raise PrepError(f"{index}: states {sequences} sequences, and ends before: it is cut")
        place = _HEADER.size
        self._sizes = raw[place : place + 4 * sequences].view("<i4")
        place += 4 * sequences
        self._offsets = raw[place : place + 8 * sequences].view("<i8")
        place += 8 * sequences
        self._bounds = raw[place : place + 8 * bounds].view("<i8")
        ends = self._offsets + self._sizes.astype(np.int64) * self.dtype.itemsize
        inside = sequences == 0 or bool(
            (self._sizes >= 0).all()
            and (self._offsets >= 0).all()
            and (self._offsets <= size).all()  # so that no sum overflows
            and ends.max() <= size
        )
        ordered = bool(
            bounds
            and self._bounds[0] == 0
            and self._bounds[-1] == sequences
            and (np.diff(self._bounds) >= 0).all()
        )
        if not (inside and ordered):
            raise PrepError(f"{index}: does not fit {self.bin}: one of them is cut or damaged")

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def bytes_of_documents(self) -> np.ndarray:
        """Bytes of the tokens of each document, int64 `[documents]`."""
        totals = np.concatenate([[0], np.cumsum(self._sizes.astype(np.int64))])
        return np.diff(totals[self._bounds]) * self.dtype.itemsize

    def documents(self, first: int, last: int) -> Iterator[np.ndarray]:
        """The tokens of the documents `first` up to `last`, not included.

        Raises:
            PrepError: the file has become shorter.
        """
        with open(self.bin, "rb") as file:
            for number in range(first, last):
                parts = []
                for sequence in range(int(self._bounds[number]), int(self._bounds[number + 1])):
                    count = int(self._sizes[sequence]) * self.dtype.itemsize
                    data = os.pread(file.fileno(), count, int(self._offsets[sequence]))
                    if len(data) != count:
                        raise PrepError(f"{self.bin}: became shorter while it was read; restore it")
                    parts.append(np.frombuffer(data, self.dtype))
                yield np.concatenate(parts) if parts else np.empty(0, self.dtype)
