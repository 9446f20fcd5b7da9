"""What every tokenizer offers, whatever library is behind it."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from xlstm_io.errors import TokenizerFileError
from xlstm_io.storage import Location

SENTENCEPIECE_NAME = "tokenizer.model"
HF_NAME, HF_CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"
SYMBOLS_NAME = "symbols.json"

TOKENIZER_FILES = (SENTENCEPIECE_NAME, HF_NAME, HF_CONFIG_NAME, SYMBOLS_NAME)
"""The names of all files that tokenizers travel with."""


@dataclass(frozen=True)
class DocumentIds:
    """Special ids of stored documents: a document is `[bos] tokens [eos]`, rows end in `pad`."""

    bos: int
    eos: int
    pad: int


class Tokenizer(ABC):
    """A tokenizer, opened from its files by `open_tokenizer`.

    Args:
        path: the file whose hash is recorded; only messages use it.
        files: see the attribute.

    Attributes:
        kind: how manifests name the library.
        path: the file whose hash is recorded in manifests and checkpoints.
        files: contents of all files that must travel with the ids, by file name; the first is the
            one that is hashed.
        sha256: SHA-256 of that file (hex).
        bos_id: id that begins a document, or None where the files name none.
        eos_id: id that ends a document, or None.
        pad_id: id of padding, or None.
    """

    kind: ClassVar[Literal["sentencepiece", "huggingface", "symbols"]]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None

    def __init__(self, path: Location, files: Mapping[str, bytes]):
        self.path, self.files = path, dict(files)
        self.sha256 = hashlib.sha256(next(iter(files.values()))).hexdigest()

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids int32 of each text, without bos and eos.

        A special token that a text spells out is encoded as the text that it is.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids; special ids give nothing."""

    @abstractmethod
    def token(self, number: int) -> str | None:
        """The token of an id as the vocabulary spells it; None for an id without one."""

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a prompt: those of a document that begins with it, bos included.

        Raises:
            TokenizerFileError: bos or eos is not defined.
        """
        return [self.document_ids().bos, *self.encode([text])[0].tolist()]

    def document_ids(self) -> DocumentIds:
        """The ids around documents. Padding takes eos where there is no pad: the loss masks it.

        Raises:
            TokenizerFileError: bos or eos is not defined.
        """
        if self.bos_id is None or self.eos_id is None:
            raise TokenizerFileError(
                f"{self.path} defines bos={self.bos_id} and eos={self.eos_id}, but documents are "
                "stored as [bos] tokens [eos]; use a tokenizer that defines both (`python -m "
                "data_prep tokenizer --from-hf DIR --bos-token .. --eos-token ..` names them for "
                "a Hugging Face tokenizer)"
            )
        return DocumentIds(
            self.bos_id, self.eos_id, self.eos_id if self.pad_id is None else self.pad_id
        )


def as_arrays(encoded: list[list[int]]) -> list[np.ndarray]:
    """Lists of ids as int32 arrays."""
    return [np.array(ids, np.int32) for ids in encoded]
