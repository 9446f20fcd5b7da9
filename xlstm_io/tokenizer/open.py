"""The tokenizer that a checkpoint names, opened by its file, for prompts and for export.

Its ids are those that data_prep gave the training documents: without bos and eos, and special
tokens that a text spells out are the text that they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from xlstm_io.errors import TokenizerFileError

SENTENCEPIECE_NAME = "tokenizer.model"
HF_NAME, HF_CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True)
class TokenizerFile:
    """A SentencePiece model or a Hugging Face tokenizer."""

    files: tuple[Path, ...]
    """What a copy needs; the first is the one whose hash a checkpoint records."""
    sha256: str
    vocab_size: int
    bos: int | None
    eos: int | None
    pad: int | None
    encode: Callable[[str], list[int]]
    """Ids of a text."""
    decode: Callable[[list[int]], str]
    """Text of ids; special ids give nothing."""

    @property
    def is_hugging_face(self) -> bool:
        """Whether it is a ``tokenizer.json``."""
        return len(self.files) > 1


def open_tokenizer(path: Path) -> TokenizerFile:
    """The tokenizer in a file (``.model``, ``tokenizer.json``) or in a folder that has one.

    Raises:
        TokenizerFileError: none there, or not a tokenizer.
    """
    if path.is_dir():
        names = (SENTENCEPIECE_NAME, HF_NAME)
        path = next((path / name for name in names if (path / name).is_file()), path / names[0])
    try:
        raw = path.read_bytes()
        return (_hugging_face if path.suffix == ".json" else _sentencepiece)(path, raw)
    except OSError as error:
        raise TokenizerFileError(f"{error.filename}: {error.strerror}") from error
    except Exception as error:  # tokenizers raises bare Exception
        kind = "a Hugging Face tokenizer" if path.suffix == ".json" else "a SentencePiece model"
        raise TokenizerFileError(f"{path} is not {kind}: {error}") from error


def _sentencepiece(path: Path, raw: bytes) -> TokenizerFile:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_proto=raw)
    ids = (model.bos_id(), model.eos_id(), model.pad_id())
    special = (number if number >= 0 else None for number in ids)
    size = model.get_piece_size()
    return TokenizerFile((path,), _sha256(raw), size, *special, model.encode, model.decode)


def _hugging_face(path: Path, raw: bytes) -> TokenizerFile:
    from tokenizers import Tokenizer

    config_path = path.with_name(HF_CONFIG_NAME)
    config = json.loads(config_path.read_bytes())
    tokenizer = Tokenizer.from_str(raw.decode())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True

    def special(role: str) -> int | None:
        token = config.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        return None if token is None else tokenizer.token_to_id(token)

    return TokenizerFile(
        (path, config_path),
        _sha256(raw),
        max(tokenizer.get_vocab().values()) + 1,
        *map(special, ("bos", "eos", "pad")),
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        tokenizer.decode,
    )


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
