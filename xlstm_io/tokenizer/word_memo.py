"""SentencePiece BPE at the speed of a dictionary: the ids of each word are worked out once.

BPE joins neighbouring symbols as long as the joined text is a piece of the vocabulary, so no merge
reaches over a place that no piece contains, and what happens on one side of it has no influence on
the other (merges are ordered by score, then position). A text cut at such places has the ids of
its parts, one after the other: exactly, not nearly. Models are trained so that pieces start with
their spaces and stay within a word and a script (``split_by_whitespace``,
``split_by_unicode_script``); whether that holds is read from the pieces, not from the settings.

Unigram models are left alone. Their Viterbi search adds scores up in single precision along the
whole text, so that which of two nearly equal cuts wins depends on how much text stands before it:
words on their own came out differently in 36 of 148 of Python's source files.
"""

from __future__ import annotations

import re
from array import array

import numpy as np
import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as model_pb2

_SPACE_SYMBOL = "\u2581"

_LIMIT = 1 << 18
"""Words that are remembered before all are forgotten: some 35 MB."""

_LONGEST = 64
"""Characters of a word that is remembered; longer ones hardly come back."""

_LETTERS = ("A-Za-z\u00aa-\u1fff", "A-Za-z\u00c0-\u024f")
_PATTERNS = (
    *(rf"\n+| *(?:[{letters}]+|[^{letters} \n]+)| +" for letters in _LETTERS),
    r"\n+| *[^ \n]+| +",
)
"""Words, finest first: a run of one kind of character with the spaces before it, or of newlines.
Whether two neighbouring characters belong to one word is decided by these two alone."""


def word_pattern(model: bytes) -> re.Pattern[str] | None:
    """What cuts a text into parts with the same ids as the whole; None if this is not certain.

    Args:
        model: a SentencePiece model file.
    """
    proto = model_pb2.ModelProto.FromString(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kinds = model_pb2.ModelProto.SentencePiece
    if (
        trainer.model_type != model_pb2.TrainerSpec.BPE
        or trainer.treat_whitespace_as_suffix
        or not trainer.byte_fallback  # neighbouring unknown characters would become one id
        or normalizer.precompiled_charsmap  # rules may look at several characters
        or normalizer.add_dummy_prefix  # each part would get one
        or normalizer.remove_extra_whitespaces
        or not normalizer.escape_whitespaces
        or any(piece.type == kinds.UNUSED for piece in proto.pieces)  # split by their last merge
    ):
        return None
    text_kinds = (kinds.NORMAL, kinds.USER_DEFINED)
    pieces = [piece.piece for piece in proto.pieces if piece.type in text_kinds]
    if any(" " in piece for piece in pieces):
        return None
    spelled = [piece.replace(_SPACE_SYMBOL, " ") for piece in pieces]
    for pattern in map(re.compile, _PATTERNS):
        if all(pattern.findall(piece) == [piece] for piece in spelled):
            return pattern
    return None


class WordMemo:
    """Encodes texts without U+2581 as ``processor`` does, remembering the ids of words.

    Args:
        processor: of a model for which there is a pattern.
        pattern: from :func:`word_pattern`.
    """

    def __init__(self, processor: spm.SentencePieceProcessor, pattern: re.Pattern[str]):
        self._processor = processor
        self._find = pattern.findall
        self._ids: dict[str, bytes] = {}  # of int32: smaller than lists, and no garbage to look for

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids int32 of each text. Where most of the text is new, none of it goes word by word."""
        words = [self._find(text) for text in texts]
        new = set().union(*words).difference(self._ids)
        if 2 * sum(map(len, new)) > sum(map(len, texts)):  # languages without spaces
            return arrays(self._processor.encode(texts, num_threads=1))
        return self._join(words, new)

    def agrees(self, texts: list[str], expected: list[list[int]]) -> bool:
        """Whether the ids of each text, all of it word by word, are the expected ones."""
        words = [self._find(text) for text in texts]
        found = self._join(words, set().union(*words).difference(self._ids))
        return [ids.tolist() for ids in found] == expected

    def _join(self, words: list[list[str]], new: set[str]) -> list[np.ndarray]:
        missing = list(new)
        found = self._processor.encode(missing, num_threads=1)
        stored = (array("i", ids).tobytes() for ids in found)
        self._ids.update(zip(missing, stored, strict=True))
        look_up = self._ids.__getitem__
        ids = [np.frombuffer(b"".join(map(look_up, each)), np.int32) for each in words]
        if len(self._ids) > _LIMIT:
            self._ids.clear()
        for word in missing:
            if len(word) > _LONGEST:
                self._ids.pop(word, None)
        return ids


def arrays(encoded: list[list[int]]) -> list[np.ndarray]:
    """Lists of ids as int32 arrays."""
    return [np.array(ids, np.int32) for ids in encoded]
