"""Tokenizers: one way to open one and one way to encode, for shards, prompts and exports alike."""

from xlstm_io.tokenizer.base import DocumentIds, Tokenizer
from xlstm_io.tokenizer.open import open_tokenizer

__all__ = ["DocumentIds", "Tokenizer", "open_tokenizer"]
