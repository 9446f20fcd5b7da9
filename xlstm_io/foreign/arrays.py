"""Arrays in files that somebody else may have written, read without trusting what they claim.

`numpy.load` allocates what a header asks for, and 80 bytes of header ask for 2^53 numbers. Here
an array is only made of bytes that are there.
"""

import io
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np
from numpy.lib import format as npy

_MOST_HEADER = 256  # characters; numpy writes some 60 for an array of one dimension


def parse_npz(raw: bytes, dtypes: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The arrays of an uncompressed `.npz` file, each of one dimension.

    Args:
        raw: the file.
        dtypes: the stored type of each array, such as `<u8`, by name.

    Raises:
        ValueError: it is not such a file, or an array is missing or of another type.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            # `np.savez` compresses nothing, so a small file cannot claim large arrays.
            if sum(member.file_size for member in archive.infolist()) > len(raw):
                raise ValueError("its arrays are larger than the file")
            return {name: _array(archive.read(f"{name}.npy"), dtypes[name]) for name in dtypes}
    except KeyError as error:
        raise ValueError(str(error.args[0])) from None
    # An encrypted member is a RuntimeError, an unknown compression a NotImplementedError.
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error) or type(error).__name__) from None


def _array(raw: bytes, dtype: str) -> np.ndarray:
    """The array of a `.npy` file."""
    file = io.BytesIO(raw)
    if npy.read_magic(file) != (1, 0):
        raise ValueError("an array of another version of numpy's format")
    try:
        shape, _, found = npy.read_array_header_1_0(file, max_header_size=_MOST_HEADER)
    except Exception as error:  # the header is parsed as Python: errors of its tokenizer, too
        raise ValueError(f"an array with a damaged header ({type(error).__name__})") from None
    expected = np.dtype(dtype)
    if found != expected or len(shape) != 1:
        raise ValueError(f"an array of {len(shape)} dimensions of {found}, not one of {expected}")
    if shape[0] * expected.itemsize != len(raw) - file.tell():
        raise ValueError(f"an array says {shape[0]} values and has other bytes")
    return np.frombuffer(raw, expected, offset=file.tell())
