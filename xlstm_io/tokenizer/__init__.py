"""Tokenizers: one way to open one and one way to encode, for shards, prompts and exports alike."""

from xlstm_io.tokenizer.base import TOKENIZER_FILES, DocumentIds, Tokenizer
from xlstm_io.tokenizer.open import open_tokenizer, read_tokenizer_files, tokenizer_from_files

__all__ = [
    "TOKENIZER_FILES",
    "DocumentIds",
    "Tokenizer",
    "open_tokenizer",
    "read_tokenizer_files",
    "tokenizer_from_files",
]
