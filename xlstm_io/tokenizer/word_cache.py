"""SentencePiece BPE at the speed of a dictionary: the ids of each word are worked out once.

BPE joins neighbouring symbols as long as the joined text is a piece of the vocabulary. So no merge
reaches over a place that no piece contains, and what happens on one side of it has no influence on
the other (merges are ordered by score, then position). A text cut at such places has the ids of
its parts, one after the other: exactly, not nearly. Models are trained so that pieces start with
their spaces and stay within a word and a script (`split_by_whitespace`, `split_by_unicode_script`).
Whether that holds is read from the pieces, not from the settings.

Unigram models are left alone. Their Viterbi search adds scores up in single precision along the
whole text, so which of two nearly equal cuts wins depends on how much text stands before it: words
on their own came out differently in 36 of 148 of Python's source files.
"""

import logging
import re
from array import array
from collections.abc import Sequence

import numpy as np
import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from xlstm_io.storage import Location
from xlstm_io.tokenizer.base import as_arrays

log = logging.getLogger(__name__)

_SPACE_SYMBOL = "\u2581"

_LIMIT = 1 << 18
"""Words in the cache before it is emptied: some 35 MB."""

_LONGEST = 64
"""Characters of a word that is kept; longer ones hardly come back."""

_CHECKED_CHARS = 200_000
"""Characters of the first texts that are encoded both ways and compared, in every process."""

AWKWARD = (
    "",
    " ",
    "  a   b ",
    "\t\ta\t b",
    "a\r\nb\r\n \n  \n\n\n",
    "a\0b",
    "na\u00efve cafe\u0301 \u0301",
    "\U0001f600\U0001f468\u200d\U0001f469 x\u200b",
    "x" * 5000,
    "\u65e5\u672c\u8a9e \u0434\u0430 \u05e9\u05dc",
    "a1_b2.c3 <s></s><0x0A> don't--stop",
    "\xa0\u3000\x85\u2028",
)
"""Texts that are always among the compared ones."""

_LETTERS = ("A-Za-z\u00aa-\u1fff", "A-Za-z\u00c0-\u024f")
_PATTERNS = (
    *(rf"\n+| *(?:[{letters}]+|[^{letters} \n]+)| +" for letters in _LETTERS),
    r"\n+| *[^ \n]+| +",
)
"""Words, finest first: a run of one kind of character with the spaces before it, or of newlines.
Whether two neighbouring characters belong to one word is decided by these two alone."""


def word_pattern(model: model_pb2.ModelProto) -> re.Pattern[str] | None:
    """What cuts a text into parts with the same ids as the whole; None if this is not certain."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kinds = model_pb2.ModelProto.SentencePiece
    if (
        trainer.model_type != model_pb2.TrainerSpec.BPE
        or trainer.treat_whitespace_as_suffix
        or not trainer.byte_fallback  # neighbouring unknown characters would become one id
        or normalizer.precompiled_charsmap  # rules may look at several characters
        or normalizer.add_dummy_prefix  # each part would get one
        or normalizer.remove_extra_whitespaces
        or not normalizer.escape_whitespaces
        or any(piece.type == kinds.UNUSED for piece in model.pieces)  # split by their last merge
    ):
        return None
    text_kinds = (kinds.NORMAL, kinds.USER_DEFINED)
    pieces = [piece.piece for piece in model.pieces if piece.type in text_kinds]
    if any(" " in piece for piece in pieces):
        return None
    as_text = [piece.replace(_SPACE_SYMBOL, " ") for piece in pieces]
    for pattern in map(re.compile, _PATTERNS):
        if all(pattern.findall(piece) == [piece] for piece in as_text):
            return pattern
    return None


class WordCache:
    """Encodes texts without U+2581 as `processor` does, and keeps the ids of words.

    Args:
        processor: of a model for which there is a pattern.
        pattern: from `word_pattern`.
    """

    def __init__(self, processor: spm.SentencePieceProcessor, pattern: re.Pattern[str]):
        self._processor = processor
        self._find = pattern.findall
        self._ids: dict[str, bytes] = {}  # of int32: smaller than lists, and no garbage to look for

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids int32 of each text. Where most of the text is new, none of it goes word by word."""
        words = [self._find(text) for text in texts]
        new = self._new_words(words)
        if 2 * sum(map(len, new)) > sum(map(len, texts)):  # languages without spaces
            return as_arrays(self._processor.encode(list(texts), num_threads=1))
        return self._join(words, new)

    def agrees(self, texts: Sequence[str], expected: list[list[int]]) -> bool:
        """Whether the ids of each text, all of it word by word, are the expected ones."""
        words = [self._find(text) for text in texts]
        found = self._join(words, self._new_words(words))
        return [ids.tolist() for ids in found] == expected

    def _new_words(self, words: list[list[str]]) -> set[str]:
        return set[str]().union(*words).difference(self._ids)

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


class CheckedWordCache:
    """A word cache that is compared with SentencePiece on its first texts.

    After a difference, of which none is known, it is not used any more: the ids are SentencePiece's
    in any case.

    Attributes:
        in_use: whether no difference was found so far.

    Args:
        processor: of a model for which there is a pattern.
        pattern: from `word_pattern`.
        path: of the model, for the message.
    """

    def __init__(
        self, processor: spm.SentencePieceProcessor, pattern: re.Pattern[str], path: Location
    ):
        self.in_use = True
        self._processor, self._path = processor, path
        self._cache = WordCache(processor, pattern)
        self._unchecked = _CHECKED_CHARS

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids int32 of each text."""
        if not self.in_use:
            return as_arrays(self._processor.encode(list(texts), num_threads=1))
        if self._unchecked <= 0:
            return self._cache.encode(texts)
        compared = [*AWKWARD, *texts]
        expected = self._processor.encode(compared, num_threads=1)
        self._unchecked -= sum(map(len, texts))
        if not self._cache.agrees(compared, expected):
            self.in_use = False
            log.warning(
                f"{self._path}: ids of words differ from ids of whole texts; going on without the "
                "word cache (slower, same ids as SentencePiece)"
            )
        return as_arrays(expected[len(AWKWARD) :])
