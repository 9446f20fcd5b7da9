"""SentencePiece models, with U+2581 kept as a character.

With a model that `python -m data_prep tokenizer` trains, a text comes back from its ids unchanged:
the model does not normalise, adds no space in front, removes no spaces, has newline as a symbol of
its own, and spells characters that the vocabulary lacks in bytes. One character needs help.
SentencePiece writes a space as U+2581 inside, so it decodes a U+2581 of the text to a space. Here
a U+2581 is encoded as its three bytes instead. Models from elsewhere may change more of a text;
builds count the documents that do not come back.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from xlstm_io.storage import Location
from xlstm_io.tokenizer.base import SENTENCEPIECE_NAME, Tokenizer, as_arrays
from xlstm_io.tokenizer.word_cache import CheckedWordCache, word_pattern

SPACE_SYMBOL = "\u2581"
"""How SentencePiece writes a space in its pieces."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file. BPE models encode through a word cache, with the same ids.

    Args:
        path: the `.model` file, for messages.
        files: its bytes, under the name `tokenizer.model`.

    Raises:
        RuntimeError: it is not a model.
        UnicodeDecodeError: one of its pieces is not UTF-8.
    """

    kind = "sentencepiece"

    def __init__(self, path: Location, files: Mapping[str, bytes]):
        model = files[SENTENCEPIECE_NAME]
        super().__init__(path, {SENTENCEPIECE_NAME: model})
        self._processor = spm.SentencePieceProcessor(model_proto=model)
        # SentencePiece takes pieces that are not UTF-8, and raises when one of them is used.
        self._processor.id_to_piece(list(range(self.vocab_size)))
        self.bos_id = _id_or_none(self._processor.bos_id())
        self.eos_id = _id_or_none(self._processor.eos_id())
        self.pad_id = _id_or_none(self._processor.pad_id())

    @cached_property
    def proto(self) -> model_pb2.ModelProto:
        """The model as SentencePiece's protocol buffer: pieces and training settings."""
        return model_pb2.ModelProto.FromString(self.files[SENTENCEPIECE_NAME])

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self._processor.get_piece_size()

    def token(self, number: int) -> str | None:
        """The piece of an id."""
        return self._processor.id_to_piece(number)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids int32 of each text, without bos and eos."""
        if self._space_symbol_ids is None:
            return self._encode_without_symbol(texts)
        with_symbol = [number for number, text in enumerate(texts) if SPACE_SYMBOL in text]
        rest = list(texts)
        for number in with_symbol:
            rest[number] = ""
        encoded = self._encode_without_symbol(rest)
        for number in with_symbol:
            encoded[number] = self._encode_with_symbol(texts[number], self._space_symbol_ids)
        return encoded

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids; control ids (bos, eos, pad) give nothing."""
        return self._processor.decode(np.asarray(ids, np.int64).tolist())

    def _encode_without_symbol(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._word_cache is not None:
            return self._word_cache.encode(texts)
        return as_arrays(self._processor.encode(list(texts), num_threads=1))

    def _encode_with_symbol(self, text: str, symbol_ids: list[int]) -> np.ndarray:
        """Ids of a text with U+2581: those of the parts between, and its bytes."""
        first, *rest = (self._processor.encode(part) for part in text.split(SPACE_SYMBOL))
        for part in rest:
            first += symbol_ids
            first += part
        return np.array(first, np.int32)

    @cached_property
    def _space_symbol_ids(self) -> list[int] | None:
        """Ids of the bytes of U+2581; None for a model without pieces for bytes."""
        pieces = [f"<0x{byte:02X}>" for byte in SPACE_SYMBOL.encode("utf-8")]
        ids = [self._processor.piece_to_id(piece) for piece in pieces]
        return ids if all(map(self._processor.is_byte, ids)) else None

    @cached_property
    def _word_cache(self) -> CheckedWordCache | None:
        pattern = word_pattern(self.proto)
        return None if pattern is None else CheckedWordCache(self._processor, pattern, self.path)


def _id_or_none(number: int) -> int | None:
    """SentencePiece gives -1 for a special symbol that a model does not have."""
    return None if number < 0 else number
