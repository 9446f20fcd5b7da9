"""Tokenizers: SentencePiece models, and Hugging Face ``tokenizer.json`` files.

With a SentencePiece model of our own training text goes in and out unchanged: identity
normalisation, no dummy prefix, no removal of spaces, newline as a symbol of its own, bytes for what
the vocabulary lacks. One character needs help: SentencePiece writes a space as U+2581 and so reads
a U+2581 of the text back as a space; it is spelled in byte pieces here. Other models may lose more;
builds count what does not come back.

BPE models encode through a memory of words (word_memo.py), with the ids that SentencePiece gives.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import sentencepiece as spm

from xlstm_io.errors import PrepError
from xlstm_io.tokenizer.word_memo import WordMemo, arrays, word_pattern

log = logging.getLogger(__name__)

MODEL_NAME = "tokenizer.model"
HF_NAME, HF_CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"
_SPACE_SYMBOL = "\u2581"

_CHECKED_CHARS = 200_000
"""Of the first texts, encoded both ways and compared, in every process."""

_AWKWARD = (
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


class SentencePieceTokenizer:
    """A SentencePiece model file.

    Attributes: path, the file; files, what must travel with the shards, by name (the
    hashed one first); sha256 of the
    file; bos_id, eos_id, pad_id.

    Args:
        path: the ``.model`` file, or a folder with ``tokenizer.model``.

    Raises:
        PrepError: no such file, not a model, or a model without bos and eos.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path):
        path = Path(path)
        self.path = path / MODEL_NAME if path.is_dir() else path
        try:
            model = self.path.read_bytes()
        except OSError as error:
            raise PrepError(
                f"--tokenizer {path}: cannot read {self.path.name} ({error.strerror}); train one "
                "with `xlstm-data tokenizer` and give its --out folder"
            ) from None
        self.sha256 = hashlib.sha256(model).hexdigest()
        try:
            self._processor = spm.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise PrepError(f"--tokenizer {self.path}: not a SentencePiece model") from None
        self.files = {MODEL_NAME: model}
        self._unchecked = _CHECKED_CHARS
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        pad_id = self._processor.pad_id()
        self.pad_id = self.eos_id if pad_id < 0 else pad_id  # masked everywhere: any id serves
        if min(self.bos_id, self.eos_id) < 0:
            raise PrepError(
                f"--tokenizer {self.path}: bos_id={self.bos_id}, eos_id={self.eos_id}, but "
                "documents are stored as [bos] tokens [eos]; use a model that defines both"
            )

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self._processor.get_piece_size()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids int32 of each text, without bos and eos."""
        if self._space_symbol_ids is None:
            return arrays(self._processor.encode(texts, num_threads=1))
        spelled = [number for number, text in enumerate(texts) if _SPACE_SYMBOL in text]
        whole = list(texts)
        for number in spelled:
            whole[number] = ""
        encoded = self._encode_whole(whole)
        for number in spelled:
            encoded[number] = np.array(self._encode_space_symbol(texts[number]), np.int32)
        return encoded

    def _encode_whole(self, texts: list[str]) -> list[np.ndarray]:
        if self._memo is None:
            return arrays(self._processor.encode(texts, num_threads=1))
        if self._unchecked <= 0:
            return self._memo.encode(texts)
        compared = [*_AWKWARD, *texts]
        expected = self._processor.encode(compared, num_threads=1)
        self._unchecked -= sum(map(len, texts))
        if not self._memo.agrees(compared, expected):
            self._memo = None
            log.warning(
                f"{self.path}: ids of words differ from ids of whole texts; going on without the "
                "memory of words (slower, same ids as SentencePiece)"
            )
        return arrays(expected[len(_AWKWARD) :])

    @cached_property
    def _memo(self) -> WordMemo | None:
        pattern = word_pattern(self.files[MODEL_NAME])
        return None if pattern is None else WordMemo(self._processor, pattern)

    def decode(self, ids: np.ndarray) -> str:
        """The text of some ids; control ids (bos, eos, pad) give nothing."""
        return self._processor.decode(np.asarray(ids).tolist())

    @cached_property
    def _space_symbol_ids(self) -> list[int] | None:
        pieces = [f"<0x{byte:02X}>" for byte in _SPACE_SYMBOL.encode("utf-8")]
        ids = [self._processor.piece_to_id(piece) for piece in pieces]
        return ids if all(map(self._processor.is_byte, ids)) else None

    def _encode_space_symbol(self, text: str) -> list[int]:
        first, *rest = (self._processor.encode(part) for part in text.split(_SPACE_SYMBOL))
        for part in rest:
            first += self._space_symbol_ids
            first += part
        return first


class HuggingFaceTokenizer:
    """A folder with ``tokenizer.json`` and ``tokenizer_config.json``, as transformers saves it.

    Special tokens that are spelled out in a text are encoded as the text that they are.

    Attributes: as :class:`SentencePieceTokenizer`; ``path`` is the ``tokenizer.json``.

    Raises:
        PrepError: files are missing or not of their kind, or bos or eos is not defined.
    """

    kind = "huggingface"

    def __init__(self, path: Path):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes are the parallelism
        from tokenizers import Tokenizer as FastTokenizer  # slow to import, rarely needed

        path = Path(path)
        folder = path.parent if path.name == HF_NAME else path
        self.path = folder / HF_NAME
        try:
            self.files = {name: (folder / name).read_bytes() for name in (HF_NAME, HF_CONFIG_NAME)}
            config = json.loads(self.files[HF_CONFIG_NAME])
            self._tokenizer = FastTokenizer.from_str(self.files[HF_NAME].decode())
        except OSError as error:
            raise PrepError(f"--tokenizer {folder}: {error.filename}: {error.strerror}") from None
        except Exception as error:  # the library raises bare Exception
            raise PrepError(f"--tokenizer {folder}: not a tokenizer ({error})") from None
        self.sha256 = hashlib.sha256(self.files[HF_NAME]).hexdigest()
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        names = {key: _token(config.get(f"{key}_token")) for key in ("bos", "eos", "pad")}
        ids = {key: name and self._tokenizer.token_to_id(name) for key, name in names.items()}
        if ids["bos"] is None or ids["eos"] is None:
            raise PrepError(
                f"--tokenizer {folder}: bos_token={names['bos']!r}, eos_token={names['eos']!r} in "
                f"{HF_CONFIG_NAME}, but documents are stored as [bos] tokens [eos]; name tokens of "
                "the vocabulary with `xlstm-data tokenizer --from-hf DIR --bos-token .. "
                "--eos-token ..`"
            )
        self.bos_id, self.eos_id = ids["bos"], ids["eos"]
        self.pad_id = self.eos_id if ids["pad"] is None else ids["pad"]  # masked: any id serves

    @property
    def vocab_size(self) -> int:
        """Number of ids, with added tokens."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids int32 of each text, without bos and eos."""
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return arrays([item.ids for item in encoded])

    def decode(self, ids: np.ndarray) -> str:
        """The text of some ids; special ids give nothing."""
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)


def _token(value) -> str | None:
    """A token of tokenizer_config.json: a string, or a dictionary with its content."""
    return value.get("content") if isinstance(value, dict) else value


Tokenizer = SentencePieceTokenizer | HuggingFaceTokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a folder or file.

    Raises:
        PrepError: none there, or a broken one.
    """
    path = Path(path)
    if path.name == HF_NAME or ((path / HF_NAME).exists() and not (path / MODEL_NAME).exists()):
        return HuggingFaceTokenizer(path)
    return SentencePieceTokenizer(path)


@lru_cache(maxsize=1)
def cached_tokenizer(path: str, sha256: str) -> Tokenizer:
    """The tokenizer of a worker process, loaded once; ``sha256`` makes a changed file a miss."""
    tokenizer = load_tokenizer(path)
    if tokenizer.sha256 != sha256:
        raise PrepError(f"--tokenizer {path}: changed while the build was running; run it again")
    return tokenizer
